"""Running the compile step in a process of its own, which takes torch and its memory along when it ends."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from typing import IO, TYPE_CHECKING

from emb_model_provider.artifacts.compile_job import Phase, Result, read_event

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.artifacts.compile_job import Job

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "emb_model_provider.compiler")
_LOOK_S = 0.2
_STILL_AFTER_S = 30.0
"""How often a phase that takes long is mentioned again."""
_KEPT_LINES = 40
_SECRET_WORDS = ("TOKEN", "API_KEY", "PASSWORD", "SECRET", "CREDENTIAL")


class ChildDiedError(Exception):
    """The compile process ended without a result: it was killed, or ran out of memory."""


def run_child(job: Job, *, stopped: Callable[[], bool]) -> Result:
    """Compile in a child process and log its progress. Blocks until the child is gone.

    The child is in a process group of its own and is killed when this process ends, when `stopped` says so, and
    on any exception here.

    Raises: ChildDiedError, InterruptedError when stopped.
    """
    alias = job.spec.alias
    started = time.monotonic()
    process = subprocess.Popen(  # noqa: S603 - our own module, run by our own interpreter
        COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
        env=_environment(job.threads),
    )
    last_words: deque[str] = deque(maxlen=_KEPT_LINES)
    lines: queue.Queue[str | None] = queue.Queue()
    readers = [
        threading.Thread(target=_forward, args=(process.stdout, lines.put), daemon=True),
        threading.Thread(target=_forward, args=(process.stderr, _keeper(alias, last_words)), daemon=True),
    ]
    try:
        for reader in readers:
            reader.start()
        # Its stdin stays open: the end of it tells the child that we are gone.
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(job.to_json() + "\n")
                process.stdin.flush()
        result = _follow(alias, lines, stopped)
        if result is None:
            raise ChildDiedError(_last_words(process.wait(), last_words))
        logger.info("model %s: compiling took %.1f s in all", alias, time.monotonic() - started)
        return result
    finally:
        _end(process)
        for reader in readers:
            reader.join()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def _follow(alias: str, lines: queue.Queue[str | None], stopped: Callable[[], bool]) -> Result | None:
    """Log the child's phases until it gives its result; None where it ends without one."""
    phase, since, told_at = "start", time.monotonic(), time.monotonic()
    logger.info("model %s: compiling for this processor; it is done once and kept", alias)
    while True:
        if stopped():
            raise InterruptedError(f"compiling {alias} was stopped")
        now = time.monotonic()
        if now - told_at >= _STILL_AFTER_S:
            logger.info("model %s: still compiling (%s, %.0f s)", alias, phase, now - since)
            told_at = now
        try:
            line = lines.get(timeout=_LOOK_S)
        except queue.Empty:
            continue
        if line is None:
            return None
        try:
            event = read_event(line)
        except (ValueError, KeyError, TypeError):
            continue
        now = time.monotonic()
        logger.info("model %s: compiling: %s took %.1f s", alias, phase, now - since)
        if isinstance(event, Result):
            return event
        if isinstance(event, Phase):
            phase, since, told_at = event.name, now, now
            logger.debug("model %s: compiling: %s", alias, phase, extra={"compile_phase": phase})


def _forward(stream: IO[str] | None, receive: Callable[[str | None], None]) -> None:
    with contextlib.suppress(ValueError, OSError):  # closed under us
        for line in stream or ():
            receive(line.rstrip("\n"))
    receive(None)


def _keeper(alias: str, last_words: deque[str]) -> Callable[[str | None], None]:
    def keep(line: str | None) -> None:
        if line and line.strip():
            last_words.append(line.strip())
            logger.debug("model %s: compile process: %s", alias, line)

    return keep


def _last_words(code: int, last_words: deque[str]) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            hint = " (most often: not enough memory)" if name == "SIGKILL" else ""
            return f"the compile process was killed by {name}{hint}"
    tail = last_words[-1][:300] if last_words else "it said nothing"
    return f"the compile process ended with status {code}: {tail}"


def _environment(threads: int) -> dict[str, str]:
    """The child reaches no hub, and sees none of this service's secrets: it may run a repository's code."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("EMB_PROVIDER_") and not any(word in name.upper() for word in _SECRET_WORDS)
    }
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # Threads that spin while they wait take the processor from the one they wait for, as soon as anything else
        # computes here: the corpus took 36 s at fp32 instead of 3. Alone on the machine it makes no difference.
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
    }


def _end(process: subprocess.Popen[str]) -> None:
    """Leave nothing of the child's process group running."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
    process.wait()
