"""The threads that own a model. Everybody else sends them jobs and gets futures."""

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
    """Runs one model on threads of its own: one creates and closes the backend, one a lane calls `embed`."""

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
        """Guards all that follows, and the jobs' counts; idle lanes wait on it."""
        self._batcher: Batcher[EmbeddingJob] | None = None
        self._idle = 0
        self._lanes = 1
        self._stopping = False
        self._lane_tokens_per_s = _ASSUMED_TOKENS_PER_S
        self._owner = threading.Thread(target=self._main, name=f"model-{model}", daemon=True)
        self._loaded: Future[ModelDescription] = Future()

    def start(self) -> Future[ModelDescription]:
        """Start the threads; the future is done once the model is loaded, or carries why it is not."""
        self._owner.start()
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
            if self._idle:
                self._wake.notify(len(job.ids))

    def cancel(self, job: EmbeddingJob) -> None:
        """Drop what still waits of a job that nobody awaits any more."""
        with self._wake:
            if self._batcher is not None:
                self._batcher.cancel(job)

    def stop(self) -> None:
        """Take no more jobs, finish those that were taken, close the backend. Blocks until that is done."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._owner.is_alive():
            self._owner.join()

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

    @property
    def _tokens_per_s(self) -> float:
        return self._lane_tokens_per_s * self._lanes

    # --- the threads ----------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            backend = self._load()
            batcher: Batcher[EmbeddingJob] = Batcher(self._policy_for(backend.description))
            self._lanes = backend.lanes
        except BaseException as error:  # noqa: BLE001 - whatever it is, whoever waits for the model must hear it
            self._loaded.set_exception(error)
            return
        self._batcher = batcher
        others = [
            threading.Thread(
                target=self._serve, args=(backend, batcher), name=f"model-{self._model}-{lane}", daemon=True
            )
            for lane in range(1, backend.lanes)
        ]
        for thread in others:
            thread.start()
        self._loaded.set_result(backend.description)
        self._serve(backend, batcher)
        for thread in others:
            thread.join()
        backend.close()

    def _serve(self, backend: Backend, batcher: Batcher[EmbeddingJob]) -> None:
        while (batch := self._next_batch(batcher)) is not None:
            self._run(backend, batch)

    def _next_batch(self, batcher: Batcher[EmbeddingJob]) -> Batch[EmbeddingJob] | None:
        with self._wake:
            self._idle += 1
            while True:
                now = time.monotonic()
                # Nobody else will come once we are stopping: no use waiting for more.
                decision = batcher.next_batch(float("inf") if self._stopping else now, idle_lanes=self._idle)
                if isinstance(decision, Batch):
                    break
                if decision is None and self._stopping:
                    self._idle -= 1
                    return None
                self._wake.wait(None if decision is None else decision - now)
            self._idle -= 1
            for job, _ in decision.members:
                if job._started_at is None:
                    job._started_at = now
            return decision

    def _run(self, backend: Backend, batch: Batch[EmbeddingJob]) -> None:
        started = time.monotonic()
        failed = self._embed(backend, batch.members)
        ended = time.monotonic()
        # Counted before it is answered: whoever has an answer finds it in the figures.
        self._on_batch(
            BatchRecord(
                model=self._model,
                inputs=len(batch.members),
                tokens=batch.tokens,
                padded_tokens=batch.padded_tokens,
                inference_s=ended - started,
                queue_s=started - min(job.arrived_at for job, _ in batch.members),
                failed=failed,
            )
        )
        self._finish(batch, ended, took=ended - started)

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
        failure: Exception | None = None
        try:
            vectors = backend.embed(batch)
            finite: NDArray[np.bool_] = np.asarray(np.isfinite(vectors).all(axis=1))
        except Exception as error:  # noqa: BLE001 - whatever a runtime raises: see _after_a_failure
            failure = error
        if failure is not None:
            # Outside the handler, so that the halves' failures do not drag this one's traceback along.
            return self._after_a_failure(backend, members, failure)
        for vector, (job, row) in zip(vectors, members, strict=True):
            job._vectors[row] = vector
        if finite.all():
            return False
        for i in np.flatnonzero(~finite).tolist():
            logger.error("model %s gave a non-finite vector for %d tokens", self._model, len(batch.ids[i]))
            self._fail(
                members[i][0], InferenceError("The model gave a vector that is not finite for an input.")
            )
        return True

    def _after_a_failure(
        self, backend: Backend, members: Sequence[tuple[EmbeddingJob, int]], failure: Exception
    ) -> bool:
        if len(members) == 1:
            job, row = members[0]
            logger.error(
                "model %s failed on an input of %d tokens", self._model, len(job.ids[row]), exc_info=failure
            )
            self._fail(job, InferenceError(f"The model failed on an input ({type(failure).__name__})."))
            return True
        logger.warning(
            "model %s failed on a batch of %d inputs (%s); running it in halves",
            self._model, len(members), type(failure).__name__,
        )  # fmt: skip
        middle = len(members) // 2
        first, second = self._embed(backend, members[:middle]), self._embed(backend, members[middle:])
        return first or second

    def _fail(self, job: EmbeddingJob, error: ProviderError) -> None:
        self.cancel(job)
        _tell(job._loop, _set_exception, job, error)

    def _finish(self, batch: Batch[EmbeddingJob], ended: float, *, took: float) -> None:
        """Hand over the vectors of every request that has them all, with one wake-up for each event loop."""
        done: dict[asyncio.AbstractEventLoop, list[tuple[EmbeddingJob, Timing]]] = {}
        with self._wake:
            rate = batch.padded_tokens / max(took, 1e-6)
            self._lane_tokens_per_s += _RATE_SMOOTHING * (rate - self._lane_tokens_per_s)
            for job, _ in batch.members:
                job._remaining -= 1
                # A failed job is cancelled: it has been told already.
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
