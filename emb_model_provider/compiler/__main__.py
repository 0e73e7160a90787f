"""The compiler process, `python -m emb_model_provider.compiler`, started by `artifacts.compiler_process`.

It computes at low priority, opens no connections, logs to stderr, and ends with the process that started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import signal
import sys
import threading
import warnings
from typing import TYPE_CHECKING, NoReturn

from emb_model_provider.artifacts.compiler_process import (
    CompileJob,
    CompileResult,
    CompileStep,
    reserve_stdout,
    to_line,
)
from emb_model_provider.compiler.failures import result_of
from emb_model_provider.errors import LoadError
from emb_model_provider.formatting import describe_error
from emb_model_provider.snapshots.files import CACHE_SETTING, translate_os_error

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

_NICE = 10
_PR_SET_PDEATHSIG = 1
_IMPORTED_LAST = ("sympy", "sklearn.metrics")


def main() -> NoReturn:
    """Run one job, report its result whatever happens, and end the process."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    out = reserve_stdout()
    step = "start"

    def send(event: CompileStep | CompileResult) -> None:
        out.write(to_line(event))
        out.flush()

    def begin(name: str) -> None:
        nonlocal step
        step = name
        send(CompileStep(name))

    try:
        result = _run(sys.stdin.readline(), begin)
    except BaseException as error:
        logger.exception("The step %r failed", step)
        result = result_of(error, step)
    send(result)
    # Without finalizing the interpreter, which takes seconds with torch, and may abort because of threads of libraries.
    sys.stderr.flush()
    os._exit(0)


def exit_with_parent(parent: int, *, watches_stdin: bool = True) -> None:
    """End this process when its parent, whose process id is `parent`, ends, however that happens.

    Without `watches_stdin`, the caller reads stdin itself, which ends with the parent, too.
    """
    if sys.platform == "linux":
        # The signal is sent when the thread that started us ends. It does not end earlier, because it waits for us.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    if not watches_stdin:
        return

    def watch_stdin() -> None:
        # Not with `sys.stdin`, because the interpreter aborts if a thread holds the lock of its buffer when it ends.
        while os.read(0, 1):
            pass
        os._exit(1)

    # On every platform stdin is closed when the parent ends.
    threading.Thread(target=watch_stdin, name="parent", daemon=True).start()


def _import_last_ones_first() -> None:
    """Import what torch and sentence-transformers import last.

    After an installation there is no bytecode yet, and the process that serves the model meanwhile imports the same
    packages at the same time. So each of the two writes bytecode that the other one reads.
    """
    for name in _IMPORTED_LAST:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _run(line: str, on_step: Callable[[str], None]) -> CompileResult:
    try:
        job = CompileJob.from_json(line)
    except (ValueError, TypeError, KeyError) as error:
        # Most often, the package was updated while the service runs, so the next start can read it.
        return CompileResult(
            "unable", f"the compiler cannot read its job: {describe_error(error)}. Restart the service"
        )
    exit_with_parent(job.parent)
    if hasattr(os, "nice"):
        os.nice(_NICE)
    on_step("import")
    # transformers imports torchao if it is installed, which takes as long as all other imports. Nothing here needs it.
    sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]  # as the import system documents
    _import_last_ones_first()
    try:
        import torch

        from emb_model_provider.compiler.build import build_artifact
    except (ImportError, LoadError) as error:
        return CompileResult("unable", f"a package that compiling needs cannot be imported: {error}")
    torch.set_num_threads(job.threads)
    try:
        with warnings.catch_warnings(action="ignore"):
            return build_artifact(job, on_step)
    except OSError as error:
        path = error.filename or job.directory
        full = translate_os_error(error, job.directory.parent, CACHE_SETTING)
        return CompileResult("unable", str(full) if full is not None else f"{error.strerror or error} ({path})")


if __name__ == "__main__":
    main()
