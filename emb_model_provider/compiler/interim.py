"""The process that runs a model with torch until it is compiled, started by `artifacts.torch_process`.

Unlike the compiler it computes at normal priority, because requests wait for it.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from emb_model_provider.artifacts.compiler_process import reserve_stdout
from emb_model_provider.artifacts.torch_process import TorchJob, arrays_of
from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.backends.repository import Repository
from emb_model_provider.backends.routes import RoutedBackend, routes_of
from emb_model_provider.compiler.__main__ import exit_with_parent
from emb_model_provider.formatting import describe_error

if TYPE_CHECKING:
    from emb_model_provider.backends.base import Backend

logger = logging.getLogger(__name__)


def main() -> None:
    """Load one model, then answer one batch after the other until stdin is closed."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    stdout = reserve_stdout()
    out = stdout.buffer

    def send(answer: dict[str, Any], content: bytes = b"") -> None:
        out.write(json.dumps(answer).encode() + b"\n" + content)
        out.flush()

    try:
        job = TorchJob.from_line(sys.stdin.readline())
        exit_with_parent(job.parent, watches_stdin=False)
        with warnings.catch_warnings(action="ignore"):
            backend = _load(job)
    except BaseException as error:
        logger.exception("The model could not be loaded")
        send({"error": describe_error(error)})
        return
    send({"description": asdict(backend.description)})
    for line in sys.stdin:
        try:
            arrays = arrays_of(backend.run(TokenBatch(**json.loads(line))))
        except Exception as error:
            logger.exception("A batch failed")
            send({"error": describe_error(error)})
        else:
            header = [(name, array.shape, array.dtype.str) for name, array in arrays.items()]
            send({"arrays": header}, b"".join(array.tobytes() for array in arrays.values()))


def _load(job: TorchJob) -> Backend:
    # transformers imports torchao if it is installed, which takes as long as all other imports. Nothing here needs it.
    sys.modules.setdefault("torchao", None)  # type: ignore[arg-type]  # as the import system documents
    import torch

    from emb_model_provider.backends.pytorch.backend import TorchBackend

    torch.set_num_threads(job.threads)
    routes = routes_of(Repository.of(job.snapshot))
    if routes is None:
        return TorchBackend(job.spec, job.snapshot, trust_remote_code=job.trust_remote_code)
    loads = {
        name: partial(
            TorchBackend, replace(job.spec, route=name), job.snapshot, trust_remote_code=job.trust_remote_code
        )
        for name in dict.fromkeys(routes.by_task.values())
    }
    return RoutedBackend.load(loads, routes)


if __name__ == "__main__":
    main()
