"""The compile process: `python -m emb_model_provider.compiler`, started by `child.run_child`.

Reads a job as one line from stdin, writes one JSON object a line to stdout (phases, then the result), and logs
to stderr. It computes at low priority, opens no connection, and ends with the process that started it.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING

from emb_model_provider.artifacts.compile_job import CompileJob, CompileResult, CompileStep, reserve_stdout
from emb_model_provider.errors import LoadError

if TYPE_CHECKING:
    from collections.abc import Callable

_NICE = 10
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Make one artifact."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    out = reserve_stdout()
    job = CompileJob.from_json(sys.stdin.readline())
    _end_with(job.parent)
    if hasattr(os, "nice"):
        os.nice(_NICE)

    def tell(event: CompileStep | CompileResult) -> None:
        out.write(event.to_json() + "\n")
        out.flush()

    tell(_run(job, lambda name: tell(CompileStep(name))))


def _run(job: CompileJob, tell: Callable[[str], None]) -> CompileResult:
    tell("import")
    # transformers imports it wherever it is installed, which takes as long as all else here. Nothing here needs it.
    sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]  # as the import system documents
    try:
        import torch

        from emb_model_provider.compiler.build import make
        from emb_model_provider.compiler.export import quietly
    except (ImportError, LoadError) as error:
        return CompileResult("unable", f"a package that compiling needs cannot be imported: {error}")
    torch.set_num_threads(job.threads)
    try:
        with quietly():
            return make(job, tell)
    except OSError as error:
        return CompileResult("unable", f"{error.strerror or error} ({error.filename or job.directory})")


def _end_with(parent: int) -> None:
    """End when the parent does, however it ends."""
    if sys.platform == "linux":
        # Its thread that started us lives as long as it waits for us.
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    def watch() -> None:
        while sys.stdin.buffer.read(1):
            pass
        os._exit(1)

    # Elsewhere, and where a thread started us that is gone: the parent's end closes our stdin.
    threading.Thread(target=watch, name="parent", daemon=True).start()


if __name__ == "__main__":
    main()
