"""Requests in the queue of a model, the futures through which they are answered, and what happens to them at a crash.

A crash loses no request: the unanswered ones run again after the restart. A request that was running when the model
crashed may be the cause, so its next batches are exclusive to it.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from emb_model_provider.serving.batcher import BatchJob

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from emb_model_provider.errors import ProviderError

_BYTES_PER_TOKEN = 40
"""Memory of a token id in the queue: a Python integer, and a place in a list."""
_BYTES_PER_VALUE = 4
_MAX_ATTEMPTS = 2
"""A request that was running at this many crashes fails, because it may be their cause."""


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

    __slots__ = ("attempts", "loop", "prompt_lengths", "remaining", "result", "started_at", "task", "tokens", "vectors")

    def __init__(
        self, ids: Sequence[Sequence[int]], *, prompt_lengths: Sequence[int], dimension: int, task: str | None = None
    ) -> None:
        super().__init__(ids)
        self.prompt_lengths = prompt_lengths
        self.tokens = self.waiting_tokens
        self.task = task
        """The task that decides the route of an asymmetric model."""
        self.loop = asyncio.get_running_loop()
        self.result: asyncio.Future[tuple[NDArray[np.float32], Timing]] = self.loop.create_future()
        self.vectors = np.empty((len(ids), dimension), dtype=np.float32)
        self.started_at: float | None = None
        self.attempts = 0
        """How often the model crashed while it ran an input of this request."""

    @property
    def held_bytes(self) -> int:
        """Memory of its token ids and vectors until it is answered, approximately."""
        return self.tokens * _BYTES_PER_TOKEN + self.vectors.size * _BYTES_PER_VALUE

    def reset(self) -> None:
        """Mark all inputs as waiting and without a vector. The request must not be in a batcher."""
        super().reset()
        self.remaining = len(self.ids)


Member = tuple[EmbeddingJob, int]
"""An input of a batch: a request and the row of its `ids`."""


@dataclass(slots=True)
class PendingJobs:
    """Accepted requests that are not answered yet. Not thread-safe; guarded by the scheduler's lock."""

    waiting: set[EmbeddingJob] = field(default_factory=set)
    """Requests in the queue or running."""
    detached: set[EmbeddingJob] = field(default_factory=set)
    """Requests that survived a crash and wait for the restart of the model, outside the queue."""
    suspects: set[EmbeddingJob] = field(default_factory=set)
    """Detached requests that were running when the model crashed: one of them may be the cause."""
    isolated: set[EmbeddingJob] = field(default_factory=set)
    """Suspects that are queued again, exclusively. Only one stream works then, so that a crash has one suspect."""
    held_bytes: int = 0
    """Memory of all these requests."""

    def add(self, job: EmbeddingJob) -> None:
        self.waiting.add(job)
        self.held_bytes += job.held_bytes

    def remove(self, job: EmbeddingJob) -> bool:
        """Remove a request that is answered or cancelled; return whether it was the last isolated one."""
        if job in self.waiting or job in self.detached:
            self.held_bytes -= job.held_bytes
        self.waiting.discard(job)
        self.detached.discard(job)
        if job not in self.isolated:
            return False
        self.isolated.discard(job)
        return not self.isolated

    def on_crash(self) -> None:
        """Keep the requests of the queue until the model is restarted."""
        self.detached, self.waiting = self.waiting, set()

    def resume(self) -> tuple[list[EmbeddingJob], list[EmbeddingJob]]:
        """Return the requests to queue again after a restart, oldest first, and the requests that fail."""
        queued: list[EmbeddingJob] = []
        failed: list[EmbeddingJob] = []
        self.isolated = set()
        for job in sorted(self.detached, key=lambda job: job.arrived_at):
            if job in self.suspects:
                job.attempts += 1
                job.exclusive = True
            if job.attempts >= _MAX_ATTEMPTS:
                failed.append(job)
                continue
            if job.exclusive:
                self.isolated.add(job)
            job.reset()
            queued.append(job)
        self.detached, self.suspects = set(), set()
        self.waiting.update(queued)
        return queued, failed

    def drain(self) -> set[EmbeddingJob]:
        """Remove and return all requests."""
        pending = self.detached | self.waiting
        self.detached, self.waiting = set(), set()
        self.held_bytes = 0
        return pending


def set_results(done: Sequence[tuple[EmbeddingJob, Timing]]) -> None:
    """Answer completed requests, waking up each event loop only once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[EmbeddingJob, Timing]]] = {}
    for job, timing in done:
        by_loop.setdefault(job.loop, []).append((job, timing))
    for loop, jobs in by_loop.items():
        _call_on_loop(loop, _set_results, jobs)


def set_exception(job: EmbeddingJob, error: ProviderError) -> None:
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
