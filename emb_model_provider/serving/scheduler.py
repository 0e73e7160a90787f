"""The queue of one model, and the streams that run batches from it.

An error that an input causes fails only its request. Any other error is a crash: an error in the scheduler itself, or a
model that no longer answers at all. A crash ends all streams of this model and of no other.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emb_model_provider.concurrency import start_thread
from emb_model_provider.errors import InferenceError, ModelNotReadyError, QueueFullError, ThreadLimitError
from emb_model_provider.formatting import format_size
from emb_model_provider.serving.batch_runner import run_batch
from emb_model_provider.serving.batcher import Batch, PriorityBatcher
from emb_model_provider.serving.jobs import BatchRecord, InferenceJob, PendingJobs, Timing, set_exception, set_results

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.backends.base import Backend
    from emb_model_provider.serving.batcher import BatchPolicy
    from emb_model_provider.serving.config import EngineConfig

logger = logging.getLogger(__name__)

_RATE_SMOOTHING = 0.1
_LARGE_SHARE = 0.25
"""The measured speed is lowered only by batches of this share of the largest one: small ones take as long on a GPU."""
_STOPPING_RETRY_AFTER_S = 5.0
_HUNG_FACTOR = 10.0
"""A batch counts as hung if it takes this many times its expected duration, and longer than the watchdog's limit."""


@dataclass(frozen=True, slots=True)
class _RunningBatch:
    started_at: float
    batch: Batch[InferenceJob]


class BatchScheduler:
    """The queue of one model and its streams. Thread-safe."""

    def __init__(self, model: str, config: EngineConfig, check: Callable[[Backend], object]) -> None:
        """Create a scheduler; `check` raises an error if a backend can no longer answer at all."""
        self._model = model
        self._check = check
        self._max_queue_tokens = config.batching.max_queue_tokens
        self._queue_bytes = config.queue_bytes
        self._watchdog_s = config.watchdog_s
        self._on_batch = config.on_batch
        self._timings = config.timings
        self._wake = threading.Condition()
        """Guards the attributes below and the counts of the requests. Idle streams wait on it."""
        self._batcher: PriorityBatcher[InferenceJob]
        self._running: list[_RunningBatch | None]
        """The current batch of each stream."""
        self._pending = PendingJobs()
        self._idle = 0
        self._stopping = False
        self._crash: BaseException | None = None
        self._failure: ModelNotReadyError | None = None
        self._stream_tokens_per_s = 1.0
        self._large_tokens = 0.0
        self._progressed_at = time.monotonic()

    def open(self, backend: Backend, policy: BatchPolicy) -> None:
        """Accept requests from now on. They wait until `run` is called."""
        with self._wake:
            self._running = [None] * backend.streams
            self._batcher = PriorityBatcher(policy)
            self._stream_tokens_per_s = policy.assumed_tokens_per_s
            self._large_tokens = _LARGE_SHARE * policy.max_batch_tokens

    def run(self, backend: Backend) -> BaseException | None:
        """Run batches on all streams, the first on this thread, until `stop` is called; return the error of a crash."""
        others = [
            threading.Thread(
                target=self._run_stream, args=(backend, stream), name=f"model-{self._model}-{stream}", daemon=True
            )
            for stream in range(1, backend.streams)
        ]
        started = 0
        try:
            for thread in others:
                start_thread(thread)
                started += 1
        except ThreadLimitError as error:
            logger.warning("model %s runs with %d of %d streams: %s", self._model, started + 1, backend.streams, error)
            others = others[:started]
            with self._wake:
                del self._running[started + 1 :]
        self._run_stream(backend, 0)
        for thread in others:
            thread.join()
        return self._crash

    def submit(self, job: InferenceJob) -> None:
        """Queue a request. Called on its event loop.

        Raises:
            QueueFullError: The queue is full.
            ModelNotReadyError: The model hangs, has failed, or is stopping.
        """
        with self._wake:
            if self._failure is not None:
                raise ModelNotReadyError(self._failure.message, retry_after_s=self._failure.retry_after_s)
            if self._stopping:
                raise ModelNotReadyError(
                    f"The model `{self._model}` is stopping. Try again later.", retry_after_s=_STOPPING_RETRY_AFTER_S
                )
            now = time.monotonic()
            hanging = [running is not None and self._is_hanging(running, now) for running in self._running]
            # After a crash the model is restarted when its last stream has ended, so one that hangs is enough.
            if any(hanging) if self._crash is not None else all(hanging):
                raise ModelNotReadyError(
                    f"The model `{self._model}` hangs: {self.hang_report}. Try again later.",
                    retry_after_s=self._timings.retry_after_failure_s,
                )
            self._check_capacity(job, self._batcher.foreground_tokens)
            job.arrived_at = now
            self._pending.add(job)
            self._batcher.submit(job)
            if self._idle:
                self._wake.notify(len(job.ids))

    def cancel(self, job: InferenceJob) -> None:
        """Remove the waiting inputs of a request whose caller was cancelled."""
        with self._wake:
            if job in self._pending.detached:
                job.cancelled = True
            else:
                self._batcher.cancel(job)
            self._remove(job)

    def resume(self, backend: Backend) -> None:
        """Queue the unanswered requests again after a crash, before the next `run`."""
        with self._wake:
            self._crash = None
            self._idle = 0
            self._running = [None] * backend.streams
            queued, failed = self._pending.resume()
            for job in queued:
                self._batcher.submit(job)
        for job in failed:
            set_exception(job, InferenceError("The model crashed each time it ran an input of this request."))

    def fail_all(self, error: ModelNotReadyError) -> None:
        """Answer all unanswered and all later requests with an error."""
        with self._wake:
            self._failure = error
            pending = self._pending.drain()
        for job in pending:
            set_exception(job, error)

    def stop(self) -> None:
        """Accept no further requests. `run` returns when the accepted ones are answered."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()

    @property
    def waiting_inputs(self) -> int:
        return self._batcher.waiting_inputs

    @property
    def waiting_tokens(self) -> int:
        return self._batcher.waiting_tokens

    def count_requests(self) -> tuple[int, int]:
        """Return how many requests wait for their first batch, and how many have begun and are not answered."""
        with self._wake:
            pending = [*self._pending.waiting, *self._pending.detached]
            waiting = sum(job.started_at is None for job in pending)
        return waiting, len(pending) - waiting

    @property
    def hang_report(self) -> str:
        """A description of the batch that hangs, or an empty string."""
        now = time.monotonic()
        for running in self._running:
            if running is not None and self._is_hanging(running, now):
                inputs = len(running.batch.members)
                return f"a batch of {inputs} inputs has been running for {now - running.started_at:.0f} s"
        return ""

    @property
    def tokens_per_s(self) -> float:
        """Measured speed of the model."""
        return self._stream_tokens_per_s * len(self._running)

    @property
    def progressed_at(self) -> float:
        """When the model completed its last batch, on the monotonic clock."""
        return self._progressed_at

    def _is_hanging(self, running: _RunningBatch, now: float) -> bool:
        expected_s = running.batch.padded_tokens / self._stream_tokens_per_s
        return now - running.started_at > max(self._watchdog_s, _HUNG_FACTOR * expected_s)

    def _check_capacity(self, job: InferenceJob, waiting: int) -> None:
        """Raise QueueFullError if the queue has no room for a request.

        An empty queue accepts a request of any size, because one that exceeds the limit could never be answered
        otherwise. Of a configured number of tokens, the largest waiting request is not counted, because smaller ones
        overtake it.
        """
        limit = self._max_queue_tokens
        if limit is None:
            held = self._pending.held_bytes
            excess_bytes = held + job.held_bytes - self._queue_bytes
            if held and excess_bytes > 0:
                raise QueueFullError(
                    f"The requests of model `{self._model}` take {format_size(held)} of memory ({waiting} tokens are "
                    "waiting), and this one does not fit. Try again later.",
                    retry_after_s=waiting * min(1.0, excess_bytes / held) / self.tokens_per_s,
                )
            return
        if waiting + job.waiting_tokens <= limit:
            return
        others = waiting - max(
            (other.waiting_tokens for other in self._pending.waiting if not other.background), default=0
        )
        if waiting and others + job.waiting_tokens > limit:
            excess = waiting if job.waiting_tokens > limit else others + job.waiting_tokens - limit
            raise QueueFullError(
                f"The queue of model `{self._model}` is full ({waiting} tokens are waiting). Try again later.",
                retry_after_s=excess / self.tokens_per_s,
            )

    def _remove(self, job: InferenceJob) -> None:
        if self._pending.remove(job):
            # The last isolated request is answered, so the other streams can continue.
            self._wake.notify_all()

    # --- on the threads of the streams ----------------------------------------------------------------

    def _run_stream(self, backend: Backend, stream: int) -> None:
        try:
            while (batch := self._next_batch(stream)) is not None:
                self._run_batch(backend, batch, stream)
        except BaseException as error:  # any error ends the streams of this model and nothing else
            self._on_crash(stream, error)
            logger.exception("model %s: stream %d crashed", self._model, stream)
        finally:
            self._running[stream] = None

    def _on_crash(self, stream: int, error: BaseException) -> None:
        with self._wake:
            running = self._running[stream]
            if running is not None:
                self._pending.suspects.update(job for job, _ in running.batch.members)
            if self._crash is None:
                self._crash = error
                self._pending.on_crash()
                self._batcher = self._batcher.drained()
            self._wake.notify_all()

    def _next_batch(self, stream: int) -> Batch[InferenceJob] | None:
        """Wait for the next batch; return None if the stream is to end."""
        with self._wake:
            while stream and self._pending.isolated and self._crash is None:
                self._wake.wait()
            self._idle += 1
            while True:
                if self._crash is not None:
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
            self._running[stream] = _RunningBatch(now, decision)
            for job, _ in decision.members:
                if job.started_at is None:
                    job.started_at = now
            return decision

    def _run_batch(self, backend: Backend, batch: Batch[InferenceJob], stream: int) -> None:
        started = time.monotonic()
        result = run_batch(self._model, backend, batch.members)
        if result.failures:
            # If the check fails too, the model is the cause and not the inputs.
            self._check(backend)
        ended = time.monotonic()
        if result.out_of_memory is not None:
            self._lower_budget(result.out_of_memory // 2, until=ended + self._timings.lowered_budget_s)
        # Recorded before the requests are answered, so that a client that has its answer finds it in the metrics.
        self._record(
            BatchRecord(
                model=self._model,
                inputs=len(batch.members),
                tokens=batch.tokens,
                padded_tokens=batch.padded_tokens,
                inference_s=ended - started,
                queue_s=started - min(job.arrived_at for job, _ in batch.members),
                failed=bool(result.failures),
                traces=tuple({id(job.trace): job.trace for job, _ in batch.members if job.trace is not None}.values()),
            )
        )
        for job, _ in result.failures:
            self.cancel(job)
        self._finish(stream, batch, ended, took_s=ended - started)
        for job, error in result.failures:
            set_exception(job, error)

    def _lower_budget(self, padded_tokens: int, *, until: float) -> None:
        with self._wake:
            self._batcher.lower_budget(padded_tokens, until=until)
        logger.warning(
            "model %s ran out of memory: its batches are limited to %d padded tokens for %d s",
            self._model, padded_tokens, self._timings.lowered_budget_s,
        )  # fmt: skip

    def _record(self, record: BatchRecord) -> None:
        try:
            self._on_batch(record)
        except Exception:
            logger.exception("model %s: a batch could not be recorded in the metrics", self._model)

    def _finish(self, stream: int, batch: Batch[InferenceJob], ended: float, *, took_s: float) -> None:
        """Answer the requests that have all their results."""
        done: list[tuple[InferenceJob, Timing]] = []
        with self._wake:
            rate = batch.padded_tokens / max(took_s, 1e-6)
            if rate > self._stream_tokens_per_s or batch.padded_tokens >= self._large_tokens:
                self._stream_tokens_per_s += _RATE_SMOOTHING * (rate - self._stream_tokens_per_s)
            for job, _ in batch.members:
                job.remaining -= 1
                # A request that failed is cancelled, and has been answered.
                if job.remaining == 0 and not job.cancelled:
                    self._remove(job)
                    started = job.started_at if job.started_at is not None else job.arrived_at
                    done.append((job, Timing(queue_s=started - job.arrived_at, inference_s=ended - started)))
            self._running[stream] = None
            self._progressed_at = ended
        set_results(done)
