"""Running a batch so that an input at fault fails alone, and no vector that is not finite gets out."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.errors import InferenceError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import Backend
    from emb_model_provider.serving.jobs import EmbeddingJob, Member

logger = logging.getLogger(__name__)

_NO_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
)
"""Parts of what runtimes say, in lower case: CUDA, PyTorch on a CPU, the operating system, C++."""


@dataclass(slots=True)
class BatchResult:
    """What became of a batch beside the vectors that its jobs have now."""

    failures: list[tuple[EmbeddingJob, InferenceError]] = field(default_factory=list)
    out_of_memory: int | None = None
    """Padded tokens of the smallest batch of several inputs that there was no memory for."""


def run_batch(model: str, backend: Backend, members: Sequence[Member]) -> BatchResult:
    """Write each member's vector to its job.

    A batch that fails is halved until the inputs at fault stand alone: only their jobs fail. A vector that is not
    finite is computed once more, at fp32.
    """
    result = BatchResult()
    _run(model, backend, members, result)
    return result


def _run(model: str, backend: Backend, members: Sequence[Member], result: BatchResult) -> bool:
    """Return whether there was no memory for an input by itself."""
    members = [member for member in members if not member[0].cancelled]
    if not members:
        return False
    failure: BaseException | None = None
    try:
        vectors = _embed(backend, members)
    except BaseException as error:  # noqa: BLE001 - whatever a runtime raises, SystemExit included: it is one input's fault
        failure = error
    if failure is not None:
        # Outside the handler, so that the halves' failures do not drag this one's traceback along.
        return _bisect(model, backend, members, failure, result)
    for vector, (job, row) in zip(vectors, members, strict=True):
        job.vectors[row] = vector
    finite: NDArray[np.bool_] = np.asarray(np.isfinite(vectors).all(axis=1))
    if not finite.all():
        _recompute(model, backend, [members[place] for place in np.flatnonzero(~finite)], result)
    return False


def _embed(backend: Backend, members: Sequence[Member]) -> NDArray[np.float32]:
    vectors = backend.embed(_batch(members))
    expected = len(members), backend.description.dimension
    if vectors.shape != expected:
        raise InferenceError(f"the model gave vectors of shape {vectors.shape} where {expected} was due")
    return vectors


def _batch(members: Sequence[Member]) -> TokenBatch:
    return TokenBatch(
        ids=[job.ids[row] for job, row in members],
        prompt_lengths=[job.prompt_lengths[row] for job, row in members],
    )


def _bisect(
    model: str, backend: Backend, members: Sequence[Member], failure: BaseException, result: BatchResult
) -> bool:
    no_memory = is_out_of_memory(failure)
    if len(members) == 1:
        job, row = members[0]
        logger.error("model %s failed on an input of %d tokens", model, len(job.ids[row]), exc_info=failure)
        result.failures.append(
            (job, InferenceError(f"The model failed on an input ({type(failure).__name__})."))
        )
        return no_memory
    logger.warning(
        "model %s failed on a batch of %d inputs (%s); running it in halves",
        model, len(members), type(failure).__name__,
    )  # fmt: skip
    middle = len(members) // 2
    first = _run(model, backend, members[:middle], result)
    alone = _run(model, backend, members[middle:], result) or first
    # Where an input runs out of memory by itself, the batches that it was in tell nothing of what others may be.
    if no_memory and not alone:
        padded = len(members) * max(len(job.ids[row]) for job, row in members)
        result.out_of_memory = min(padded, result.out_of_memory or padded)
    return alone


def _recompute(model: str, backend: Backend, members: Sequence[Member], result: BatchResult) -> None:
    """Compute vectors that were not finite once more, at fp32, each by itself."""
    for job, row in members:
        tokens = len(job.ids[row])
        try:
            vectors = backend.embed_fp32(_batch([(job, row)]))
            if vectors.shape == (1, backend.description.dimension) and np.isfinite(vectors).all():
                job.vectors[row] = vectors[0]
                logger.warning(
                    "model %s gave a vector that is not finite for %d tokens; at fp32 it is", model, tokens
                )
                continue
            logger.error(
                "model %s gave a vector that is not finite for %d tokens, at fp32 too", model, tokens
            )
        except NotImplementedError:
            logger.error("model %s gave a vector that is not finite for %d tokens", model, tokens)  # noqa: TRY400 - no more is known
        except BaseException:  # as above
            logger.exception(
                "model %s gave a vector that is not finite for %d tokens, and failed at fp32", model, tokens
            )
        result.failures.append(
            (job, InferenceError("The model gave a vector that is not finite for an input."))
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may succeed where this one failed."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    words = str(error).lower()
    return any(part in words for part in _NO_MEMORY)
