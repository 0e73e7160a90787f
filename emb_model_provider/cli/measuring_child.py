"""Running `cli.measuring` in a process of its own, which Ctrl-C ends together with this one."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMAND = (sys.executable, "-m", "emb_model_provider.cli.measuring")


class MeasuringChild:
    """A model in a process of its own, told over a pipe what to measure."""

    def __init__(self, process: subprocess.Popen[str], job: dict[str, Any]) -> None:
        self._process = process
        self.loaded = self._ask(json.dumps(job))
        """What was loaded, or `error`: why it could not be."""

    def rate(self, kind: str) -> dict[str, Any]:
        """Return `texts_per_s`, or `error`."""
        return self._ask(kind)

    def _ask(self, line: str) -> dict[str, Any]:
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("started without pipes")
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        answered = self._process.stdout.readline()
        if not answered:
            return {"error": _last_words(self._process.wait())}
        answer: dict[str, Any] = json.loads(answered)
        return answer


def _last_words(status: int) -> str:
    if status == -signal.SIGKILL:
        return "the measuring process was killed, most often since memory was short: measure fewer precisions at a time"
    return f"the measuring process ended with status {status}: what it said stands on stderr"


@contextlib.contextmanager
def measuring_child(job: dict[str, Any]) -> Iterator[MeasuringChild]:
    """Yield a process that measures what `job` says; it ends with the context, at once where that fails."""
    with contextlib.ExitStack() as stack:
        with _interrupts_wait():
            process = stack.enter_context(
                subprocess.Popen(  # noqa: S603 - our own module, run by our own interpreter
                    COMMAND,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    encoding="utf-8",
                )
            )
            stack.callback(_close, process.stdin)
            stack.push(lambda failed, _error, _trace: process.kill() if failed else None)
        yield MeasuringChild(process, job)


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C wait until what is started in here is sure to be ended with this process.

    What is started inherits it, and so is ended by this process alone, without a traceback of its own.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    came: list[int] = []
    # Blocked for what is started here. In this process another thread (numpy has some) may take the signal, whose
    # handler is called on this one all the same.
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


def _close(pipe: IO[str] | None) -> None:
    # What was not sent to a process that died cannot be sent by closing its pipe either.
    with contextlib.suppress(BrokenPipeError):
        if pipe is not None:
            pipe.close()
