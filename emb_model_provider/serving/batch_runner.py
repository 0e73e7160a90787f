"""Runs a batch so that only the inputs that cause an error fail, and only finite results are returned."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from emb_model_provider.backends.arrays import check_shapes, finite_rows
from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.errors import DeviceLostError, InferenceError
from emb_model_provider.formatting import first_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emb_model_provider.backends.base import Backend, InputKey, Outputs
    from emb_model_provider.serving.jobs import InferenceJob, Member

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = (
    "out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "bad_alloc",
    "cublas_status_alloc_failed", "cudnn_status_alloc_failed",
)  # fmt: skip
"""Parts of error messages in lower case: of CUDA, PyTorch on a CPU, operating systems and C++."""
_DEVICE_LOST = (
    "cuda error",
    "cublas_status_execution_failed",
    "cublas_status_internal_error",
    "unspecified launch failure",
)
"""Likewise, of errors after which every call of CUDA fails in this process, such as an illegal memory access."""
_RECOVERABLE = (
    "invalid argument", "invalid configuration", "invalid_value", "no kernel image", "not supported", "not_supported",
    "too many resources",
)  # fmt: skip
"""Likewise, of errors of CUDA that concern one call only, such as a batch that is too large for a kernel."""
_NOT_FINITE = "model %s returned a result that is not finite for an input of %d tokens"


@dataclass(slots=True)
class BatchResult:
    """Failures of a batch. The results of the other inputs are in their jobs."""

    failures: list[tuple[InferenceJob, InferenceError]] = field(default_factory=list)
    out_of_memory: int | None = None
    """Padded tokens of the smallest batch of several inputs that did not fit into memory."""


def run_batch(model: str, backend: Backend, members: Sequence[Member]) -> BatchResult:
    """Run the model, and write the results of each member to its job.

    A batch that fails is bisected until the inputs that cause the failure run alone, so that only their requests fail.
    A result that is not finite is computed again at fp32.
    """
    result = BatchResult()
    _run(model, backend, members, result)
    return result


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether a smaller batch can succeed where this one failed."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    message = str(error).lower()
    return any(phrase in message for phrase in _OUT_OF_MEMORY)


def is_device_lost(error: BaseException) -> bool:
    """Return whether an error is one after which a GPU cannot be used again in this process."""
    message = str(error).lower()
    if is_out_of_memory(error) or any(phrase in message for phrase in _RECOVERABLE):
        return False
    return type(error).__name__ == "AcceleratorError" or any(phrase in message for phrase in _DEVICE_LOST)


def _run(model: str, backend: Backend, members: Sequence[Member], result: BatchResult) -> bool:
    """Run a batch or a part of one; return whether a single input did not fit into memory."""
    members = [member for member in members if not member[0].cancelled]
    if not members:
        return False
    failure: BaseException | None = None
    try:
        outputs, places = _compute(backend, members)
    except BaseException as error:  # noqa: BLE001 - a runtime can raise anything, SystemExit included, for one input
        failure = error
    if failure is not None:
        # Called outside the handler, so that the tracebacks of the halves do not include this one.
        return _bisect(model, backend, members, failure, result)
    for place, (job, row) in zip(places, members, strict=True):
        job.rows[row] = outputs.row(place, job.outputs)
    finite = finite_rows(outputs, max(places) + 1)
    if not finite.all():
        _recompute(
            model, backend, [member for place, member in zip(places, members, strict=True) if not finite[place]], result
        )
    return False


def _compute(backend: Backend, members: Sequence[Member]) -> tuple[Outputs, list[int]]:
    """Return the results of the distinct inputs, and the place of each member among them.

    Different requests often have the same input, which is computed once.
    """
    distinct: dict[InputKey, int] = {}
    firsts: list[Member] = []
    places = []
    for member in members:
        job, row = member
        place = distinct.setdefault(job.inputs.key(row), len(firsts))
        if place == len(firsts):
            firsts.append(member)
        places.append(place)
    batch = TokenBatch.join([(job.inputs, row) for job, row in firsts], [job.outputs for job, _ in members])
    outputs = backend.run(batch)
    check_shapes(outputs, batch, backend.description)
    return outputs, places


def _bisect(
    model: str, backend: Backend, members: Sequence[Member], failure: BaseException, result: BatchResult
) -> bool:
    """Run the halves of a batch that failed; return whether a single input did not fit into memory."""
    if is_device_lost(failure):
        raise DeviceLostError(
            f"The GPU has failed and cannot be used again in this process ({first_line(failure)})."
        ) from failure
    no_memory = is_out_of_memory(failure)
    if len(members) == 1:
        job, row = members[0]
        logger.error("model %s failed on an input of %d tokens", model, len(job.ids[row]), exc_info=failure)
        result.failures.append((job, InferenceError(f"The model failed on an input ({type(failure).__name__}).")))
        return no_memory
    logger.warning(
        "model %s failed on a batch of %d inputs (%s), running its halves",
        model, len(members), type(failure).__name__,
    )  # fmt: skip
    middle = len(members) // 2
    first = _run(model, backend, members[:middle], result)
    single = _run(model, backend, members[middle:], result) or first
    # If a single input does not fit, the size of the batches that contained it says nothing about other batches.
    if no_memory and not single:
        lengths = [len(job.ids[row]) for job, row in members]
        padded = sum(lengths) if backend.description.packs else len(lengths) * max(lengths)
        result.out_of_memory = min(padded, result.out_of_memory or padded)
    return single


def _recompute(model: str, backend: Backend, members: Sequence[Member], result: BatchResult) -> None:
    """Compute results that were not finite again, one by one at fp32."""
    for job, row in members:
        tokens = len(job.ids[row])
        try:
            batch = TokenBatch.join([(job.inputs, row)], [job.outputs])
            outputs = backend.run_fp32(batch)
            check_shapes(outputs, batch, backend.description)
            if finite_rows(outputs, 1)[0]:
                job.rows[row] = outputs.row(0, job.outputs)
                logger.warning(f"{_NOT_FINITE}; it is finite at fp32", model, tokens)
                continue
            logger.error(f"{_NOT_FINITE}, at fp32 too", model, tokens)
        except NotImplementedError:
            logger.error(_NOT_FINITE, model, tokens)  # noqa: TRY400 - the traceback says nothing
        except BaseException as error:  # a runtime can raise anything
            if is_device_lost(error):
                raise DeviceLostError(f"The GPU has failed and cannot be used again ({first_line(error)}).") from error
            logger.exception(f"{_NOT_FINITE}, and failed at fp32", model, tokens)
        result.failures.append((job, InferenceError("The model returned a result that is not finite for an input.")))
