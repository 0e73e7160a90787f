"""The thread that owns a model. Everybody else sends it jobs and gets futures."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.errors import InferenceError, ModelNotReadyError, ProviderError, QueueFullError
from emb_model_provider.serving.batcher import Batch, Batcher, BatchPolicy, Job

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import Backend, ModelDescription

logger = logging.getLogger(__name__)

_QUEUE_SECONDS = 20.0
_ASSUMED_TOKENS_PER_S = 5_000.0
"""Until the first batches have been measured."""
_RATE_SMOOTHING = 0.1
_DRAIN_RETRY_AFTER_S = 5.0


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


class EmbeddingJob(Job):
    """A job whose vectors are awaited on an event loop."""

    __slots__ = ("_loop", "_remaining", "_started_at", "_vectors", "prompt_lengths", "result")

    def __init__(
        self, ids: Sequence[Sequence[int]], *, prompt_lengths: Sequence[int], dimension: int
    ) -> None:
        super().__init__(ids)
        self.prompt_lengths = prompt_lengths
        self._loop = asyncio.get_running_loop()
        self.result: asyncio.Future[tuple[NDArray[np.float32], Timing]] = self._loop.create_future()
        """Vectors, float32 of shape (inputs, dimension), as the backend gave them; and how long they took."""
        self._vectors = np.empty((len(ids), dimension), dtype=np.float32)
        self._remaining = len(ids)
        self._started_at: float | None = None


class Worker:
    """Runs one model on one thread, which creates, uses and closes the backend."""

    def __init__(
        self,
        model: str,
        load: Callable[[], Backend],
        policy_for: Callable[[ModelDescription], BatchPolicy],
        *,
        max_queue_tokens: int | None,
        on_batch: Callable[[BatchRecord], None],
    ) -> None:
        self._model = model
        self._load = load
        self._policy_for = policy_for
        self._max_queue_tokens = max_queue_tokens
        self._on_batch = on_batch
        self._wake = threading.Condition()
        self._batcher: Batcher[EmbeddingJob] | None = None
        self._stopping = False
        self._tokens_per_s = _ASSUMED_TOKENS_PER_S
        self._thread = threading.Thread(target=self._main, name=f"model-{model}", daemon=True)
        self._loaded: Future[ModelDescription] = Future()

    def start(self) -> Future[ModelDescription]:
        """Start the thread; the future is done once the model is loaded, or carries why it is not."""
        self._thread.start()
        return self._loaded

    def submit(self, job: EmbeddingJob) -> None:
        """Queue a job; its `result` will be set. Called on the job's event loop.

        Raises: QueueFullError, or ModelNotReadyError once `stop` was called.
        """
        with self._wake:
            if self._stopping or self._batcher is None:
                raise ModelNotReadyError(
                    f"The model `{self._model}` is being stopped: ask again later.",
                    retry_after_s=_DRAIN_RETRY_AFTER_S,
                )
            waiting = self._batcher.waiting_tokens
            # An empty queue takes any request, or one over the limit could never be answered.
            if waiting and waiting + job.waiting_tokens > self.max_queue_tokens:
                raise QueueFullError(
                    f"The queue of model `{self._model}` is full ({waiting} tokens wait). Ask again later.",
                    retry_after_s=waiting / self._tokens_per_s,
                )
            job.arrived_at = time.monotonic()
            self._batcher.submit(job)
            self._wake.notify()

    def cancel(self, job: EmbeddingJob) -> None:
        """Drop what still waits of a job that nobody awaits any more."""
        with self._wake:
            if self._batcher is not None:
                self._batcher.cancel(job)

    def stop(self) -> None:
        """Take no more jobs, finish those that were taken, close the backend. Blocks until that is done."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def max_queue_tokens(self) -> int:
        """The limit that was set, else what the model does in about 20 seconds at its measured speed."""
        return self._max_queue_tokens or int(_QUEUE_SECONDS * self._tokens_per_s)

    @property
    def waiting_inputs(self) -> int:
        return self._batcher.waiting_inputs if self._batcher is not None else 0

    @property
    def waiting_tokens(self) -> int:
        return self._batcher.waiting_tokens if self._batcher is not None else 0

    # --- the thread -----------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            backend = self._load()
            with self._wake:
                self._batcher = Batcher(self._policy_for(backend.description))
        except BaseException as error:  # noqa: BLE001 - whatever it is, whoever waits for the model must hear it
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(backend.description)
        while (batch := self._next_batch(self._batcher)) is not None:
            self._run(backend, batch)
        backend.close()

    def _next_batch(self, batcher: Batcher[EmbeddingJob]) -> Batch[EmbeddingJob] | None:
        with self._wake:
            while True:
                now = time.monotonic()
                decision = batcher.next_batch(float("inf") if self._stopping else now)
                if isinstance(decision, Batch):
                    return decision
                if decision is None and self._stopping:
                    return None
                self._wake.wait(None if decision is None else decision - now)

    def _run(self, backend: Backend, batch: Batch[EmbeddingJob]) -> None:
        started = time.monotonic()
        for job, _ in batch.members:
            if job._started_at is None:
                job._started_at = started
        failed = self._embed(backend, batch.members)
        ended = time.monotonic()
        self._finish(batch.members, ended)

        took = ended - started
        rate = batch.padded_tokens / max(took, 1e-6)
        self._tokens_per_s += _RATE_SMOOTHING * (rate - self._tokens_per_s)
        self._on_batch(
            BatchRecord(
                model=self._model,
                inputs=len(batch.members),
                tokens=batch.tokens,
                padded_tokens=batch.padded_tokens,
                inference_s=took,
                queue_s=started - min(job.arrived_at for job, _ in batch.members),
                failed=failed,
            )
        )

    def _embed(self, backend: Backend, members: Sequence[tuple[EmbeddingJob, int]]) -> bool:
        """Write each member's vector to its job; return whether any failed.

        A batch that fails is halved until the inputs at fault stand alone: only their requests fail.
        """
        members = [member for member in members if not member[0].cancelled]
        if not members:
            return False
        batch = TokenBatch(
            ids=[job.ids[row] for job, row in members],
            prompt_lengths=[job.prompt_lengths[row] for job, row in members],
        )
        try:
            vectors = backend.embed(batch)
            finite: NDArray[np.bool_] = np.asarray(np.isfinite(vectors).all(axis=1))
        except Exception as error:
            if len(members) == 1:
                logger.exception("model %s failed on an input of %d tokens", self._model, len(batch.ids[0]))
                self._fail(
                    members[0][0], InferenceError(f"The model failed on an input ({type(error).__name__}).")
                )
                return True
            logger.warning(
                "model %s failed on a batch of %d inputs (%s); running it in halves",
                self._model, len(members), type(error).__name__,
            )  # fmt: skip
            middle = len(members) // 2
            first, second = self._embed(backend, members[:middle]), self._embed(backend, members[middle:])
            return first or second
        for i, (job, row) in enumerate(members):
            if finite[i]:
                job._vectors[row] = vectors[i]
                job._remaining -= 1
            else:
                logger.error(
                    "model %s gave a non-finite vector for %d tokens", self._model, len(batch.ids[i])
                )
                self._fail(job, InferenceError("The model gave a vector that is not finite for an input."))
        return not bool(finite.all())

    def _fail(self, job: EmbeddingJob, error: ProviderError) -> None:
        self.cancel(job)
        _tell(job._loop, _set_exception, job, error)

    def _finish(self, members: Sequence[tuple[EmbeddingJob, int]], ended: float) -> None:
        """Hand over the vectors of every request that has them all, with one wake-up for each event loop."""
        done: dict[asyncio.AbstractEventLoop, list[tuple[EmbeddingJob, Timing]]] = {}
        for job in {job: None for job, _ in members}:
            if job._remaining == 0 and not job.cancelled:
                started = job._started_at if job._started_at is not None else job.arrived_at
                timing = Timing(queue_s=started - job.arrived_at, inference_s=ended - started)
                done.setdefault(job._loop, []).append((job, timing))
        for loop, jobs in done.items():
            _tell(loop, _set_results, jobs)


def _tell(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: object) -> None:
    # A loop that is closed has nobody left who waits; that must not end the thread for the others.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(callback, *args)


def _set_results(jobs: Sequence[tuple[EmbeddingJob, Timing]]) -> None:
    for job, timing in jobs:
        if not job.result.done():
            job.result.set_result((job._vectors, timing))


def _set_exception(job: EmbeddingJob, error: ProviderError) -> None:
    if not job.result.done():
        job.result.set_exception(error)
