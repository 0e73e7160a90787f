"""Requests in the queue of a model, the futures through which they are answered, and what happens to them at a crash.

A crash loses no request: the unanswered ones run again after the restart. A request that was running when the model
crashed may be the cause, so its next batches are exclusive to it.
"""

from __future__ import annotations

import asyncio
import contextlib
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from emb_model_provider.serving.batcher import BatchJob

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from emb_model_provider.backends.base import OutputName, Row, TokenBatch
    from emb_model_provider.errors import ProviderError

trace_context: ContextVar[object] = ContextVar("trace_context", default=None)
"""Identifies the span of a request, for the records of its batches; None without tracing."""


_BYTES_PER_TOKEN = 40
"""Memory of a token id in the queue: a Python integer, and a place in a list."""
_MAX_ATTEMPTS = 2
"""A request that was running at this many crashes fails, because it may be their cause."""

_background: ContextVar[bool] = ContextVar("background", default=False)
_max_attempts: ContextVar[int] = ContextVar("max_attempts", default=_MAX_ATTEMPTS)


@contextlib.contextmanager
def in_background(*, max_attempts: int = _MAX_ATTEMPTS) -> Iterator[None]:
    """Requests that are made in this context run only while no other request waits, except for a small share.

    They fail if they were running at `max_attempts` crashes of the model.
    """
    tokens = _background.set(True), _max_attempts.set(max_attempts)
    try:
        yield
    finally:
        _background.reset(tokens[0])
        _max_attempts.reset(tokens[1])


def is_background() -> bool:
    """Return whether the present context is that of background requests."""
    return _background.get()


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
    traces: tuple[object, ...] = ()
    """The values of `trace_context` in the requests of this batch, if they have one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRecord:
    """Measurements of the stages of one request: tokenization, queue, inference. Times in seconds."""

    model: str
    inputs: int
    tokens: int
    truncated: int
    started_at: float
    """When its tokenization began, on the monotonic clock."""
    tokenize_s: float
    submitted_at: float | None
    """When it was queued, on the monotonic clock. None if all its results were in the result cache."""
    timing: Timing


@dataclass(frozen=True, slots=True)
class Timing:
    """Measurements of one request, in seconds."""

    queue_s: float
    """From its submission to the start of its first batch."""
    inference_s: float
    """From there to the end of its last batch."""


class InferenceJob(BatchJob):
    """A request whose results are awaited on an event loop."""

    __slots__ = ("attempts", "inputs", "loop", "max_attempts", "output_bytes", "outputs", "remaining", "result", "rows", "started_at", "tokens", "trace")  # fmt: skip

    def __init__(self, inputs: TokenBatch, outputs: tuple[OutputName, ...], *, output_bytes: int = 0) -> None:
        """Create a request for some outputs, whose results take a number of bytes."""
        super().__init__(inputs.ids, background=_background.get())
        self.inputs = inputs
        self.outputs = outputs
        self.output_bytes = output_bytes
        self.tokens = self.waiting_tokens
        self.loop = asyncio.get_running_loop()
        self.result: asyncio.Future[tuple[Sequence[tuple[Row, ...]], Timing]] = self.loop.create_future()
        self.rows: list[tuple[Row, ...]] = [()] * len(inputs.ids)
        """For each input, the requested outputs in their order; empty until they are computed."""
        self.trace = trace_context.get()
        self.started_at: float | None = None
        self.max_attempts = _max_attempts.get()
        self.attempts = 0
        """How often the model crashed while it ran an input of this request."""

    @property
    def held_bytes(self) -> int:
        """Memory of its token ids and results until it is answered, approximately."""
        return self.tokens * _BYTES_PER_TOKEN + self.output_bytes

    def reset(self) -> None:
        """Mark all inputs as waiting and without results. The request must not be in a batcher."""
        super().reset()
        self.remaining = len(self.ids)


Member = tuple[InferenceJob, int]
"""An input of a batch: a request and the row of its `ids`."""


@dataclass(slots=True)
class PendingJobs:
    """Accepted requests that are not answered yet. Not thread-safe; guarded by the scheduler's lock."""

    waiting: set[InferenceJob] = field(default_factory=set)
    """Requests in the queue or running."""
    detached: set[InferenceJob] = field(default_factory=set)
    """Requests that survived a crash and wait for the restart of the model, outside the queue."""
    suspects: set[InferenceJob] = field(default_factory=set)
    """Detached requests that were running when the model crashed: one of them may be the cause."""
    isolated: set[InferenceJob] = field(default_factory=set)
    """Suspects that are queued again, exclusively. Only one stream works then, so that a crash has one suspect."""
    held_bytes: int = 0
    """Memory of all these requests."""

    def add(self, job: InferenceJob) -> None:
        self.waiting.add(job)
        self.held_bytes += job.held_bytes

    def remove(self, job: InferenceJob) -> bool:
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

    def resume(self) -> tuple[list[InferenceJob], list[InferenceJob]]:
        """Return the requests to queue again after a restart, oldest first, and the requests that fail."""
        queued: list[InferenceJob] = []
        failed: list[InferenceJob] = []
        self.isolated = set()
        for job in sorted(self.detached, key=lambda job: job.arrived_at):
            if job in self.suspects:
                job.attempts += 1
                job.exclusive = True
            if job.attempts >= job.max_attempts:
                failed.append(job)
                continue
            if job.exclusive:
                self.isolated.add(job)
            job.reset()
            queued.append(job)
        self.detached, self.suspects = set(), set()
        self.waiting.update(queued)
        return queued, failed

    def drain(self) -> set[InferenceJob]:
        """Remove and return all requests."""
        pending = self.detached | self.waiting
        self.detached, self.waiting = set(), set()
        self.held_bytes = 0
        return pending


def set_results(done: Sequence[tuple[InferenceJob, Timing]]) -> None:
    """Answer completed requests, waking up each event loop only once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[InferenceJob, Timing]]] = {}
    for job, timing in done:
        by_loop.setdefault(job.loop, []).append((job, timing))
    for loop, jobs in by_loop.items():
        _call_on_loop(loop, _set_results, jobs)


def set_exception(job: InferenceJob, error: ProviderError) -> None:
    _call_on_loop(job.loop, _set_exception, job, error)


def _call_on_loop(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: object) -> None:
    # A closed loop has no callers any more. The error must not end the thread, because it serves other loops too.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *args)


def _set_results(jobs: Sequence[tuple[InferenceJob, Timing]]) -> None:
    for job, timing in jobs:
        if not job.result.done():
            job.result.set_result((job.rows, timing))


def _set_exception(job: InferenceJob, error: ProviderError) -> None:
    if not job.result.done():
        job.result.set_exception(error)
