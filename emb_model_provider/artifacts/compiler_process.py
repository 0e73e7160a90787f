"""Runs the compiler in a child process, which frees torch and its memory when it ends."""

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

from emb_model_provider.artifacts.compile_job import CompileResult, CompileStep, read_event
from emb_model_provider.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.artifacts.compile_job import CompileJob
    from emb_model_provider.progress import CancelToken, OnProgress, Phase

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "emb_model_provider.compiler")
_POLL_S = 0.2
_KEPT_LINES = 40
_SECRET_WORDS = ("TOKEN", "API_KEY", "PASSWORD", "SECRET", "CREDENTIAL")
_COMPARE_STEPS = ("reference vectors", "verify", "measure")
"""Steps that compare the compiled model with the reference; the others make it."""


class CompilerDiedError(Exception):
    """The compiler process ended without a result: it was killed, or ran out of memory."""


def run_compiler(job: CompileJob, on_progress: OnProgress, cancel: CancelToken) -> CompileResult:
    """Compile in a child process. Blocks until the child is gone.

    The child has its own process group, and is killed when this process ends, when `cancel` is cancelled, and on
    any exception here.

    Args:
        job: What to compile.
        on_progress: Called at the start of each step.
        cancel: Kills the child.

    Raises:
        CompilerDiedError: The child ended without a result.
        OperationCancelledError: `cancel` was cancelled.
        OSError: The child could not be started.
    """
    alias = job.spec.alias
    started = time.monotonic()
    logger.info("model %s: compiling for this processor; this is done once, and the result is kept", alias)
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
    stderr_lines: deque[str] = deque(maxlen=_KEPT_LINES)
    lines: queue.Queue[str | None] = queue.Queue()

    def keep_stderr(line: str | None) -> None:
        if line and line.strip():
            stderr_lines.append(line.strip())
            logger.debug("model %s: compiler: %s", alias, line)

    readers = [
        threading.Thread(target=_forward, args=(process.stdout, lines.put), daemon=True),
        threading.Thread(target=_forward, args=(process.stderr, keep_stderr), daemon=True),
    ]
    try:
        for reader in readers:
            reader.start()
        # Its stdin stays open, because the end of it tells the child that this process is gone.
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(job.to_json() + "\n")
                process.stdin.flush()
        result = _follow(job, lines, on_progress, cancel)
        if result is None:
            raise CompilerDiedError(_describe_end(process.wait(), stderr_lines))
        logger.info("model %s: compiled in %.1f s", alias, time.monotonic() - started)
        return result
    finally:
        _kill(process)
        for reader in readers:
            reader.join()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def _follow(
    job: CompileJob, lines: queue.Queue[str | None], on_progress: OnProgress, cancel: CancelToken
) -> CompileResult | None:
    """Report the steps of the child until its result; None if it ends without one."""
    step, since = "start", time.monotonic()
    while True:
        cancel.raise_if_cancelled()
        try:
            line = lines.get(timeout=_POLL_S)
        except queue.Empty:
            continue
        if line is None:
            return None
        try:
            event = read_event(line)
        except (ValueError, KeyError, TypeError):
            continue
        now = time.monotonic()
        logger.debug("model %s: compiling: %s took %.1f s", job.spec.alias, step, now - since)
        if isinstance(event, CompileResult):
            return event
        if isinstance(event, CompileStep):
            step, since = event.name, now
            phase: Phase = "compare" if step in _COMPARE_STEPS else "compile"
            on_progress(Progress(phase, job.snapshot.repository, step=step))


def _forward(stream: IO[str] | None, receive: Callable[[str | None], None]) -> None:
    with contextlib.suppress(ValueError, OSError):  # closed while it is read
        for line in stream or ():
            receive(line.rstrip("\n"))
    receive(None)


def _describe_end(code: int, stderr_lines: deque[str]) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            hint = " (most often: not enough memory)" if name == "SIGKILL" else ""
            return f"the compiler process was killed by {name}{hint}"
    tail = stderr_lines[-1][:300] if stderr_lines else "it printed nothing"
    return f"the compiler process ended with status {code}: {tail}"


def _environment(threads: int) -> dict[str, str]:
    """Return the environment of the child: offline, and without secrets, because it may run code of a repository."""
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
        # Threads that spin while they wait take the processor from the thread they wait for as soon as another process
        # computes: embedding the corpus at fp32 took 36 s instead of 3 s.
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "ignore",
    }


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill the process group of the child."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
    process.wait()
