"""Runs the compiler in a child process, which frees torch and its memory when it ends.

Both exchange one JSON object per line over stdin and stdout of the child: a job, then the steps and the result.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TextIO

from emb_model_provider.artifacts.compile_steps import CompileSteps
from emb_model_provider.artifacts.recipe import Recipe
from emb_model_provider.concurrency import start_thread
from emb_model_provider.model_spec import ModelSpec, RequestDefaults
from emb_model_provider.progress import Progress
from emb_model_provider.snapshots.snapshot import Snapshot, SnapshotFile

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.progress import CancelToken, OnProgress

logger = logging.getLogger(__name__)

COMMAND = (sys.executable, "-m", "emb_model_provider.compiler")
_POLL_S = 0.2
_REPORT_S = 1.0
_KEPT_LINES = 40
_LAST_WORDS_S = 5.0
"""How long to wait for the last lines of a compiler that has ended, whose own children may keep its stderr open."""
_SECRET_WORDS = ("TOKEN", "API_KEY", "PASSWORD", "SECRET", "CREDENTIAL")
_COMPARE_STEPS = ("reference vectors", "verify", "measure")
"""Steps that compare the compiled model with the reference; the others make it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileJob:
    """An artifact to compile."""

    spec: ModelSpec
    snapshot: Snapshot
    recipe: Recipe
    directory: Path
    """An empty directory for its files."""
    threads: int
    tune_s: float = 0
    """Seconds in which the fastest options of the runtime are chosen. 0: they keep their defaults."""
    parent: int = field(default_factory=os.getpid)
    """Process id of the service; the compiler ends when it ends."""

    def to_json(self) -> str:
        """Return the job as one line."""
        return json.dumps(asdict(replace(self, spec=without_access(self.spec))), default=os.fspath)

    @classmethod
    def from_json(cls, line: str) -> CompileJob:
        values = json.loads(line)
        recipe = values["recipe"]
        recipe["compute"] = tuple(recipe["compute"])
        return cls(
            spec=read_spec(values["spec"]),
            snapshot=read_snapshot(values["snapshot"]),
            recipe=Recipe(**recipe),
            directory=Path(values["directory"]),
            threads=values["threads"],
            tune_s=values["tune_s"],
            parent=values["parent"],
        )


@dataclass(frozen=True, slots=True)
class CompileStep:
    """The compiler began a step that takes a while."""

    step: str


@dataclass(frozen=True, slots=True)
class CompileResult:
    """The last message of the compiler."""

    outcome: Literal["done", "refused", "unsupported", "broken", "unable", "no memory"]
    """`done`: the directory contains an artifact. `refused`: it was made, but its vectors are not accurate enough.
    `unsupported`: the pipeline cannot be exported. `broken`: the snapshot cannot be loaded by any backend.
    `unable`: this machine cannot compile now, because a disk is full or a package cannot be imported. `no memory`: it
    has not enough free memory."""
    reason: str = ""
    """Why there is no artifact, in one line."""


class CompilerDiedError(Exception):
    """The compiler process ended without a result."""


class CompilerKilledError(CompilerDiedError):
    """The compiler process was killed by SIGKILL, as the system does if memory runs out."""


class CompileTimeoutError(Exception):
    """The compiler, or one of its steps, took longer than allowed, and was killed."""

    def __init__(self, message: str, step: str) -> None:
        super().__init__(message)
        self.step = step
        """The step that it was in."""


def run_compiler(
    job: CompileJob, on_progress: OnProgress, cancel: CancelToken, *, timeout_s: float = 0, step_timeout_s: float = 0
) -> CompileResult:
    """Compile in a child process. Blocks until the child is gone.

    The child has its own process group, and is killed when this process ends, when `cancel` is cancelled, and on
    any exception here.

    Args:
        job: The artifact to compile.
        on_progress: Called when the child begins a step.
        cancel: Cancels the compilation.
        timeout_s: Seconds that it may take; 0 for no limit.
        step_timeout_s: Seconds that each of its steps may take; 0 for no limit.

    Raises:
        CompilerDiedError: The child ended without a result; a CompilerKilledError if it was killed by SIGKILL.
        CompileTimeoutError: The child took longer than `timeout_s`, or a step longer than `step_timeout_s`. The message
            names the step.
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
        env=child_environment(job.threads),
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
            start_thread(reader)
        # Its stdin stays open, because the end of it tells the child that this process is gone.
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(job.to_json() + "\n")
                process.stdin.flush()
        result = _follow(job, lines, on_progress, cancel, timeout_s, step_timeout_s)
        if result is None:
            status = process.wait()
            readers[1].join(_LAST_WORDS_S)
            killed = os.name == "posix" and status == -signal.SIGKILL
            raise (CompilerKilledError if killed else CompilerDiedError)(_describe_end(status, stderr_lines))
        logger.info("model %s: compiled in %.1f s", alias, time.monotonic() - started)
        return result
    finally:
        kill_group(process)
        for reader in readers:
            if reader.ident is not None:  # it was started
                reader.join()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def reserve_stdout() -> TextIO:
    """Return a stream to stdout for messages; from now on, whatever a library prints goes to stderr."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def to_line(event: CompileStep | CompileResult) -> str:
    """Return a message of the compiler as one line."""
    return json.dumps(asdict(event)) + "\n"


def _follow(
    job: CompileJob,
    lines: queue.Queue[str | None],
    on_progress: OnProgress,
    cancel: CancelToken,
    timeout_s: float,
    step_timeout_s: float,
) -> CompileResult | None:
    """Report the steps of the child until its result; None if it ends without one."""
    step, started = "start", time.monotonic()
    since = reported = started
    steps = CompileSteps(quantizes=job.recipe.weights in ("int8", "int4"), size=job.snapshot.size, now=started)

    def report(now: float) -> None:
        on_progress(
            Progress(
                "compare" if step in _COMPARE_STEPS else "compile",
                job.snapshot.repository,
                step=step,
                step_number=steps.number,
                step_count=steps.count,
                seconds_left=steps.seconds_left(now),
            )
        )

    while True:
        cancel.raise_if_cancelled()
        now = time.monotonic()
        if timeout_s and now - started > timeout_s:
            raise CompileTimeoutError(f"compiling took longer than {timeout_s:g} s (last step: {step!r})", step)
        if step_timeout_s and now - since > step_timeout_s:
            raise CompileTimeoutError(f"compiling made no progress for {step_timeout_s:g} s (step: {step!r})", step)
        try:
            line = lines.get(timeout=_POLL_S)
        except queue.Empty:
            if (now := time.monotonic()) - reported >= _REPORT_S:
                reported = now
                report(now)
            continue
        if line is None:
            return None
        try:
            event = _read_event(line)
        except (ValueError, TypeError):  # not a message
            continue
        now = time.monotonic()
        logger.debug("model %s: compiling: %s took %.1f s", job.spec.alias, step, now - since)
        if isinstance(event, CompileResult):
            return event
        step, since = event.step, now
        steps.begin(step, now)
        report(now)


def without_access(spec: ModelSpec) -> ModelSpec:
    """Return a spec for a child process, without the token, because nothing is downloaded."""
    return replace(spec, token=None, cache_dir=None, endpoint=None, path=None)


def read_spec(values: dict[str, Any]) -> ModelSpec:
    """Read a spec from JSON."""
    sizes = values["dimensions"]
    read = {
        "dimensions": tuple(sizes) if isinstance(sizes, list) else sizes,
        "defaults": RequestDefaults(**values["defaults"]),
        "more_aliases": {alias: RequestDefaults(**each) for alias, each in values["more_aliases"].items()},
    }
    return ModelSpec(**values | read)


def read_snapshot(values: dict[str, Any]) -> Snapshot:
    """Read a snapshot from JSON."""
    files = tuple(SnapshotFile(**file) for file in values["files"])
    dependencies = tuple(read_snapshot(each) for each in values["dependencies"])
    return Snapshot(**{**values, "path": Path(values["path"]), "files": files, "dependencies": dependencies})


def _read_event(line: str) -> CompileStep | CompileResult:
    values = json.loads(line)
    return CompileStep(**values) if "step" in values else CompileResult(**values)


def _forward(stream: IO[str] | None, receive: Callable[[str | None], None]) -> None:
    with contextlib.suppress(ValueError, OSError):  # closed while it is read
        for line in stream or ():
            receive(line.rstrip("\n"))
    receive(None)


def _describe_end(code: int, stderr_lines: deque[str]) -> str:
    how = f"ended with status {code}"
    if code < 0:
        with contextlib.suppress(ValueError):
            name = signal.Signals(-code).name
            how = f"was killed by {name}{' (most often: not enough memory)' if name == 'SIGKILL' else ''}"
    tail = stderr_lines[-1][:300] if stderr_lines else "it printed nothing"
    return f"the compiler process {how}: {tail}"


def child_environment(threads: int) -> dict[str, str]:
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


def kill_group(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Kill the process group of the child."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
    process.wait()
