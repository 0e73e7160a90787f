"""Requests in the queue of a model, and the futures through which they are answered."""

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
    """Measurements of one batch. Times in seconds."""

    model: str
    inputs: int
    tokens: int
    padded_tokens: int
    inference_s: float
    queue_s: float
    """Longest wait of a request of this batch, from its submission to the start of the batch."""
    failed: bool


@dataclass(frozen=True, slots=True)
class Timing:
    """Measurements of one request, in seconds."""

    queue_s: float
    """From its submission to the start of its first batch."""
    inference_s: float
    """From there to the end of its last batch."""


class EmbeddingJob(BatchJob):
    """A request whose vectors are awaited on an event loop."""

    __slots__ = ("attempts", "loop", "prompt_lengths", "remaining", "result", "started_at", "vectors")

    def __init__(self, ids: Sequence[Sequence[int]], *, prompt_lengths: Sequence[int], dimension: int) -> None:
        super().__init__(ids)
        self.prompt_lengths = prompt_lengths
        self.loop = asyncio.get_running_loop()
        self.result: asyncio.Future[tuple[NDArray[np.float32], Timing]] = self.loop.create_future()
        """Vectors of the backend, float32 of shape (inputs, dimension), and their timing."""
        self.vectors = np.empty((len(ids), dimension), dtype=np.float32)
        self.remaining = len(ids)
        """Number of inputs that have no vector yet."""
        self.started_at: float | None = None
        self.attempts = 0
        """How often the model crashed while it ran an input of this request."""

    def reset(self) -> None:
        """Queue all inputs again, as if none had run."""
        super().reset()
        self.remaining = len(self.ids)


Member = tuple[EmbeddingJob, int]
"""An input of a batch: a request and the row of its `ids`."""


def set_results(done: Sequence[tuple[EmbeddingJob, Timing]]) -> None:
    """Answer completed requests, waking up each event loop only once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[EmbeddingJob, Timing]]] = {}
    for job, timing in done:
        by_loop.setdefault(job.loop, []).append((job, timing))
    for loop, jobs in by_loop.items():
        _call_on_loop(loop, _set_results, jobs)


def set_exception(job: EmbeddingJob, error: ProviderError) -> None:
    """Answer a request with an error."""
    _call_on_loop(job.loop, _set_exception, job, error)


def _call_on_loop(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: object) -> None:
    # A closed loop has no callers any more. The error must not end the thread, because it serves other loops too.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *args)


def _set_results(jobs: Sequence[tuple[EmbeddingJob, Timing]]) -> None:
    for job, timing in jobs:
        if not job.result.done():
            job.result.set_result((job.vectors, timing))


def _set_exception(job: EmbeddingJob, error: ProviderError) -> None:
    if not job.result.done():
        job.result.set_exception(error)
