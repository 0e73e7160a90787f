"""What a model's threads are given, and how they answer: futures on the event loops that asked."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from emb_model_provider.serving.batcher import BatchJob

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from emb_model_provider.errors import ProviderError


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """What one model batch was and took. Times in seconds."""

    model: str
    inputs: int
    tokens: int
    padded_tokens: int
    inference_s: float
    queue_s: float
    """Longest wait among the batch's requests, from submission to this batch."""
    failed: bool


@dataclass(frozen=True, slots=True)
class Timing:
    """How long a request's inputs waited for their first batch, and then took to the last one, in seconds."""

    queue_s: float
    inference_s: float


class EmbeddingJob(BatchJob):
    """A job whose vectors are awaited on an event loop."""

    __slots__ = ("attempts", "loop", "prompt_lengths", "remaining", "result", "started_at", "vectors")

    def __init__(
        self, ids: Sequence[Sequence[int]], *, prompt_lengths: Sequence[int], dimension: int
    ) -> None:
        super().__init__(ids)
        self.prompt_lengths = prompt_lengths
        self.loop = asyncio.get_running_loop()
        self.result: asyncio.Future[tuple[NDArray[np.float32], Timing]] = self.loop.create_future()
        """Vectors, float32 of shape (inputs, dimension), as the backend gave them; and how long they took."""
        self.vectors = np.empty((len(ids), dimension), dtype=np.float32)
        self.remaining = len(ids)
        """Inputs without a vector yet."""
        self.started_at: float | None = None
        self.attempts = 0
        """How often the model broke down while it ran a batch with inputs of this job."""

    def reset(self) -> None:
        """Let all inputs wait once more, as if none had run."""
        super().reset()
        self.remaining = len(self.ids)


Member = tuple[EmbeddingJob, int]
"""A job and the row of its `ids` that is meant."""


def set_results(done: Sequence[tuple[EmbeddingJob, Timing]]) -> None:
    """Hand over the vectors of jobs that have them all, with one wake-up for each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[EmbeddingJob, Timing]]] = {}
    for job, timing in done:
        by_loop.setdefault(job.loop, []).append((job, timing))
    for loop, jobs in by_loop.items():
        _call_on_loop(loop, _set_results, jobs)


def set_exception(job: EmbeddingJob, error: ProviderError) -> None:
    """Let a job's caller have an error instead of vectors."""
    _call_on_loop(job.loop, _set_exception, job, error)


def _call_on_loop(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: object) -> None:
    # A loop that is closed has nobody left who waits; that must not end the thread for the others.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *args)


def _set_results(jobs: Sequence[tuple[EmbeddingJob, Timing]]) -> None:
    for job, timing in jobs:
        if not job.result.done():
            job.result.set_result((job.vectors, timing))


def _set_exception(job: EmbeddingJob, error: ProviderError) -> None:
    if not job.result.done():
        job.result.set_exception(error)
