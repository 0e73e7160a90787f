"""The lanes of a model: threads that run batches, and the queue they take them from.

What goes wrong with an input fails that input (see `isolation.py`). What goes wrong otherwise, in a lane's own code or
because the model answers nothing any more, ends all lanes of this model, and only of this one; jobs that had no answer
are kept until the lanes run again (see `accepted.py`).
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emb_model_provider.errors import InferenceError, ModelNotReadyError, QueueFullError
from emb_model_provider.serving.batch_runner import run_batch
from emb_model_provider.serving.batcher import Batch, Batcher
from emb_model_provider.serving.jobs import BatchRecord, EmbeddingJob, Timing, set_exception, set_results
from emb_model_provider.serving.pending_jobs import PendingJobs

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.backends.base import Backend
    from emb_model_provider.serving.batcher import BatchPolicy

logger = logging.getLogger(__name__)

_QUEUE_SECONDS = 20.0
_ASSUMED_TOKENS_PER_S = 5_000.0
"""Until the first batches have been measured."""
_RATE_SMOOTHING = 0.1
_DRAIN_RETRY_AFTER_S = 5.0
_SLOWER_THAN_EXPECTED = 10.0
"""A batch that takes this many times as long as its tokens should, and the watchdog's limit, counts as hung."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """How long the service waits in unusual situations, in seconds."""

    restart_pauses_s: tuple[float, ...] = (0.0, 1.0, 4.0)
    """Before each restart of a crashed model. After as many restarts within ten minutes the model has failed."""
    retry_after_failure_s: float = 30.0
    """Until a model that failed may be loaded again."""
    lowered_budget_s: float = 60.0
    """How long batches stay small after one was too large for the memory."""
    stop_s: float = 5.0
    """How long a model may take to stop when all its requests are answered or cancelled."""
    slow_load_s: float = 300.0
    """After which a load that has not ended is reported."""


@dataclass(frozen=True, slots=True)
class _Running:
    """A batch that a lane has in hand."""

    since: float
    batch: Batch[EmbeddingJob]


class BatchScheduler:
    """The queue of one model and the threads that work it off."""

    def __init__(
        self,
        model: str,
        *,
        check: Callable[[Backend], object],
        max_queue_tokens: int | None,
        watchdog_s: float,
        on_batch: Callable[[BatchRecord], None],
        timings: Timings,
    ) -> None:
        """Prepare the queue; `open` lets jobs in. `check` raises where a backend cannot answer at all."""
        self._model = model
        self._check = check
        self._max_queue_tokens = max_queue_tokens
        self._watchdog_s = watchdog_s
        self._on_batch = on_batch
        self._timings = timings
        self._wake = threading.Condition()
        """Guards all that follows, and the jobs' counts; idle lanes wait on it."""
        self._batcher: Batcher[EmbeddingJob] | None = None
        self._pending = PendingJobs()
        self._idle = 0
        self._running: list[_Running | None] = [None]
        """What each lane has in hand."""
        self._stopping = False
        self._crash: BaseException | None = None
        self._failed: ModelNotReadyError | None = None
        self._lane_tokens_per_s = _ASSUMED_TOKENS_PER_S

    def open(self, backend: Backend, policy: BatchPolicy) -> None:
        """Let jobs in; they wait until `run`."""
        with self._wake:
            self._running = [None] * backend.streams
            self._batcher = Batcher(policy)

    def run(self, backend: Backend) -> BaseException | None:
        """Run batches on all lanes, this thread's included, until told to stop or one of them ends; return why."""
        others = [
            threading.Thread(
                target=self._run_stream,
                args=(backend, stream),
                name=f"model-{self._model}-{stream}",
                daemon=True,
            )
            for stream in range(1, backend.streams)
        ]
        for thread in others:
            thread.start()
        self._run_stream(backend, 0)
        for thread in others:
            thread.join()
        return self._crash

    def submit(self, job: EmbeddingJob) -> None:
        """Queue a job; its `result` will be set. Called on the job's event loop.

        Raises: QueueFullError; ModelNotReadyError once `stop` was called, while all lanes hang, or after `fail_all`.
        """
        with self._wake:
            if self._failed is not None:
                raise ModelNotReadyError(self._failed.message, retry_after_s=self._failed.retry_after_s)
            if self._stopping or self._batcher is None:
                raise ModelNotReadyError(
                    f"The model `{self._model}` is being stopped: ask again later.",
                    retry_after_s=_DRAIN_RETRY_AFTER_S,
                )
            now = time.monotonic()
            hanging = [running is not None and self._is_hanging(running, now) for running in self._running]
            # Where the lanes are ending, the model comes back once the last of them has ended.
            if any(hanging) if self._crash is not None else all(hanging):
                raise ModelNotReadyError(
                    f"The model `{self._model}` hangs: {self.hang_report}. Ask again later.",
                    retry_after_s=self._timings.retry_after_failure_s,
                )
            self._require_room(job, self._batcher.waiting_tokens)
            job.arrived_at = now
            self._pending.add(job)
            self._batcher.submit(job)
            if self._idle:
                self._wake.notify(len(job.ids))

    def _require_room(self, job: EmbeddingJob, waiting: int) -> None:
        """Raises: QueueFullError.

        The largest request that waits is left out: an empty queue takes any, or one over the limit could never be
        answered, and it is passed by smaller ones, so it is no reason to refuse them.
        """
        limit = self.max_queue_tokens
        if waiting + job.waiting_tokens <= limit:
            return
        others = waiting - max((other.waiting_tokens for other in self._pending.waiting), default=0)
        if waiting and others + job.waiting_tokens > limit:
            too_many = waiting if job.waiting_tokens > limit else others + job.waiting_tokens - limit
            raise QueueFullError(
                f"The queue of model `{self._model}` is full ({waiting} tokens wait). Ask again later.",
                retry_after_s=too_many / self._tokens_per_s,
            )

    def cancel(self, job: EmbeddingJob) -> None:
        """Drop what still waits of a job that nobody awaits any more."""
        with self._wake:
            if self._pending.is_detached(job):
                job.cancelled = True
            elif self._batcher is not None:
                self._batcher.cancel(job)
            self._forget(job)

    def resume(self, backend: Backend) -> None:
        """Let the next `run` have what the last one left unanswered."""
        with self._wake:
            batcher = self._batcher
            if batcher is None:
                raise RuntimeError("a model that was loaded has a queue")
            self._crash = None
            self._idle = 0
            self._running = [None] * backend.streams
            again, refused = self._pending.resume()
            for job in again:
                batcher.submit(job)
        for job in refused:
            set_exception(
                job, InferenceError("The model broke down each time it ran inputs of this request.")
            )

    def fail_all(self, error: ModelNotReadyError) -> None:
        """Let in no more, and let all who wait have the error."""
        with self._wake:
            self._failed = error
            left = self._pending.drain()
        for job in left:
            set_exception(job, error)

    def stop(self) -> None:
        """Let in no more; `run` returns when all that was accepted is answered."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()

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
    def hang_report(self) -> str:
        """What hangs, for people; empty where nothing does."""
        now = time.monotonic()
        for running in self._running:
            if running is not None and self._is_hanging(running, now):
                inputs = len(running.batch.members)
                return f"a batch of {inputs} inputs has been running for {now - running.since:.0f} s"
        return ""

    @property
    def _tokens_per_s(self) -> float:
        return self._lane_tokens_per_s * len(self._running)

    def _is_hanging(self, running: _Running, now: float) -> bool:
        expected = running.batch.padded_tokens / self._lane_tokens_per_s
        return now - running.since > max(self._watchdog_s, _SLOWER_THAN_EXPECTED * expected)

    # --- the lanes --------------------------------------------------------------------------------------

    def _run_stream(self, backend: Backend, stream: int) -> None:
        try:
            while (batch := self._next_batch(stream)) is not None:
                self._run(backend, batch, stream)
        except BaseException as error:  # whatever it is, it ends this model's lanes and nothing else
            self._end_streams(stream, error)
            logger.exception("model %s: its thread %d ended", self._model, stream)
        finally:
            self._running[stream] = None

    def _end_streams(self, stream: int, error: BaseException) -> None:
        with self._wake:
            running = self._running[stream]
            if running is not None:
                self._pending.mark_suspect(job for job, _ in running.batch.members)
            if self._crash is None:
                self._crash = error
                self._pending.on_crash()
                if self._batcher is not None:
                    self._batcher = self._batcher.drained()
            self._wake.notify_all()

    def _next_batch(self, stream: int) -> Batch[EmbeddingJob] | None:
        with self._wake:
            while stream and self._pending.isolating and self._crash is None:
                self._wake.wait()
            self._idle += 1
            while True:
                if self._crash is not None or self._batcher is None:
                    return None
                now = time.monotonic()
                decision = self._batcher.next_batch(now, idle_streams=self._idle, may_wait=not self._stopping)
                if isinstance(decision, Batch):
                    break
                if decision is None and self._stopping:
                    self._idle -= 1
                    return None
                self._wake.wait(None if decision is None else decision - now)
            self._idle -= 1
            self._running[stream] = _Running(now, decision)
            for job, _ in decision.members:
                if job.started_at is None:
                    job.started_at = now
            return decision

    def _run(self, backend: Backend, batch: Batch[EmbeddingJob], stream: int) -> None:
        started = time.monotonic()
        result = run_batch(self._model, backend, batch.members)
        if result.failures:
            # Is it the inputs, or can the model do nothing any more? Then they are no more at fault than others.
            self._check(backend)
        ended = time.monotonic()
        if result.out_of_memory is not None:
            self._lower_budget(result.out_of_memory // 2, until=ended + self._timings.lowered_budget_s)
        # Counted before it is answered: whoever has an answer finds it in the figures.
        self._count(
            BatchRecord(
                model=self._model,
                inputs=len(batch.members),
                tokens=batch.tokens,
                padded_tokens=batch.padded_tokens,
                inference_s=ended - started,
                queue_s=started - min(job.arrived_at for job, _ in batch.members),
                failed=bool(result.failures),
            )
        )
        for job, _ in result.failures:
            self.cancel(job)
        self._finish(stream, batch, ended, took=ended - started)
        for job, error in result.failures:
            set_exception(job, error)

    def _count(self, record: BatchRecord) -> None:
        try:
            self._on_batch(record)
        except Exception:
            logger.exception("model %s: a batch is missing from the figures", self._model)

    def _lower_budget(self, padded_tokens: int, *, until: float) -> None:
        with self._wake:
            if self._batcher is not None:
                self._batcher.lower_budget(padded_tokens, until=until)
        logger.warning(
            "model %s: out of memory; batches of %d padded tokens at most for %d s",
            self._model, padded_tokens, self._timings.lowered_budget_s,
        )  # fmt: skip

    def _finish(self, stream: int, batch: Batch[EmbeddingJob], ended: float, *, took: float) -> None:
        """Hand over the vectors of every request that has them all."""
        done: list[tuple[EmbeddingJob, Timing]] = []
        with self._wake:
            rate = batch.padded_tokens / max(took, 1e-6)
            self._lane_tokens_per_s += _RATE_SMOOTHING * (rate - self._lane_tokens_per_s)
            for job, _ in batch.members:
                job.remaining -= 1
                # A failed job is cancelled: it has been told already.
                if job.remaining == 0 and not job.cancelled:
                    self._forget(job)
                    started = job.started_at if job.started_at is not None else job.arrived_at
                    done.append((job, Timing(queue_s=started - job.arrived_at, inference_s=ended - started)))
            self._running[stream] = None
        set_results(done)

    def _forget(self, job: EmbeddingJob) -> None:
        """Let go of a job that is answered, or that nobody awaits; with the last suspect the other lanes go on."""
        if self._pending.forget(job):
            self._wake.notify_all()
