"""The compiler process, `python -m emb_model_provider.compiler`, started by `artifacts.compiler_process`.

It computes at low priority, opens no connections, logs to stderr, and ends with the process that started it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
import warnings
from typing import TYPE_CHECKING

from emb_model_provider.artifacts.compiler_process import (
    CompileJob,
    CompileResult,
    CompileStep,
    reserve_stdout,
    to_line,
)
from emb_model_provider.errors import LoadError

if TYPE_CHECKING:
    from collections.abc import Callable

_NICE = 10
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run one job."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    out = reserve_stdout()
    job = CompileJob.from_json(sys.stdin.readline())
    exit_with_parent(job.parent)
    if hasattr(os, "nice"):
        os.nice(_NICE)

    def send(event: CompileStep | CompileResult) -> None:
        out.write(to_line(event))
        out.flush()

    send(_run(job, lambda name: send(CompileStep(name))))


def exit_with_parent(parent: int) -> None:
    """End this process when its parent, whose process id is `parent`, ends, however that happens."""
    if sys.platform == "linux":
        # The signal is sent when the thread that started us ends. It does not end earlier, because it waits for us.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    def watch_stdin() -> None:
        while sys.stdin.buffer.read(1):
            pass
        os._exit(1)

    # On every platform stdin is closed when the parent ends.
    threading.Thread(target=watch_stdin, name="parent", daemon=True).start()


def _run(job: CompileJob, on_step: Callable[[str], None]) -> CompileResult:
    on_step("import")
    # transformers imports torchao if it is installed, which takes as long as all other imports. Nothing here needs it.
    sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]  # as the import system documents
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
        return CompileResult("unable", f"{error.strerror or error} ({error.filename or job.directory})")


if __name__ == "__main__":
    main()
