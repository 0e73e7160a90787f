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
from emb_model_provider.serving.batch_runner import run_isolated
from emb_model_provider.serving.batcher import Batch, Batcher
from emb_model_provider.serving.jobs import BatchRecord, EmbeddingJob, Timing, answer, refuse
from emb_model_provider.serving.pending_jobs import Accepted

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.backends.base import Backend
    from emb_model_provider.serving.batcher import BatchPolicy

logger = logging.getLogger(__name__)

RETRY_AFTER_A_FAILURE_S = 30.0

_QUEUE_SECONDS = 20.0
_ASSUMED_TOKENS_PER_S = 5_000.0
"""Until the first batches have been measured."""
_RATE_SMOOTHING = 0.1
_DRAIN_RETRY_AFTER_S = 5.0
_LOWERED_BUDGET_S = 60.0
"""How long batches stay small after one was too large for the memory."""
_SLOWER_THAN_EXPECTED = 10.0
"""A batch that takes this many times as long as its tokens should, and the watchdog's limit, counts as hung."""


@dataclass(frozen=True, slots=True)
class _Running:
    """A batch that a lane has in hand."""

    since: float
    batch: Batch[EmbeddingJob]


class Lanes:
    """The queue of one model and the threads that work it off."""

    def __init__(
        self,
        model: str,
        *,
        check: Callable[[Backend], object],
        max_queue_tokens: int | None,
        watchdog_s: float,
        on_batch: Callable[[BatchRecord], None],
    ) -> None:
        """Prepare the queue; `open` lets jobs in. `check` raises where a backend cannot answer at all."""
        self._model = model
        self._check = check
        self._max_queue_tokens = max_queue_tokens
        self._watchdog_s = watchdog_s
        self._on_batch = on_batch
        self._wake = threading.Condition()
        """Guards all that follows, and the jobs' counts; idle lanes wait on it."""
        self._batcher: Batcher[EmbeddingJob] | None = None
        self._accepted = Accepted()
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
            self._running = [None] * backend.lanes
            self._batcher = Batcher(policy)

    def run(self, backend: Backend) -> BaseException | None:
        """Run batches on all lanes, this thread's included, until told to stop or one of them ends; return why."""
        others = [
            threading.Thread(
                target=self._lane, args=(backend, lane), name=f"model-{self._model}-{lane}", daemon=True
            )
            for lane in range(1, backend.lanes)
        ]
        for thread in others:
            thread.start()
        self._lane(backend, 0)
        for thread in others:
            thread.join()
        return self._crash

    def submit(self, job: EmbeddingJob) -> None:
        """Queue a job; its `result` will be set. Called on the job's event loop.

        Raises: QueueFullError; ModelNotReadyError once `stop` was called, while all lanes hang, or after `give_up`.
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
            hanging = [running is not None and self._hangs(running, now) for running in self._running]
            # Where the lanes are ending, the model comes back once the last of them has ended.
            if any(hanging) if self._crash is not None else all(hanging):
                raise ModelNotReadyError(
                    f"The model `{self._model}` hangs: {self.hung}. Ask again later.",
                    retry_after_s=RETRY_AFTER_A_FAILURE_S,
                )
            self._require_room(job, self._batcher.waiting_tokens)
            job.arrived_at = now
            self._accepted.add(job)
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
        others = waiting - max((other.waiting_tokens for other in self._accepted.waiting), default=0)
        if waiting and others + job.waiting_tokens > limit:
            too_many = waiting if job.waiting_tokens > limit else others + job.waiting_tokens - limit
            raise QueueFullError(
                f"The queue of model `{self._model}` is full ({waiting} tokens wait). Ask again later.",
                retry_after_s=too_many / self._tokens_per_s,
            )

    def cancel(self, job: EmbeddingJob) -> None:
        """Drop what still waits of a job that nobody awaits any more."""
        with self._wake:
            if self._accepted.is_stranded(job):
                job.cancelled = True
            elif self._batcher is not None:
                self._batcher.cancel(job)
            self._forget(job)

    def take_up(self, backend: Backend) -> None:
        """Let the next `run` have what the last one left unanswered."""
        with self._wake:
            batcher = self._batcher
            if batcher is None:
                raise RuntimeError("a model that was loaded has a queue")
            self._crash = None
            self._idle = 0
            self._running = [None] * backend.lanes
            again, refused = self._accepted.resume()
            for job in again:
                batcher.submit(job)
        for job in refused:
            refuse(job, InferenceError("The model broke down each time it ran inputs of this request."))

    def give_up(self, error: ModelNotReadyError) -> None:
        """Let in no more, and let all who wait have the error."""
        with self._wake:
            self._failed = error
            left = self._accepted.all_gone()
        for job in left:
            refuse(job, error)

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
    def hung(self) -> str:
        """What hangs, for people; empty where nothing does."""
        now = time.monotonic()
        for running in self._running:
            if running is not None and self._hangs(running, now):
                inputs = len(running.batch.members)
                return f"a batch of {inputs} inputs has been running for {now - running.since:.0f} s"
        return ""

    @property
    def _tokens_per_s(self) -> float:
        return self._lane_tokens_per_s * len(self._running)

    def _hangs(self, running: _Running, now: float) -> bool:
        expected = running.batch.padded_tokens / self._lane_tokens_per_s
        return now - running.since > max(self._watchdog_s, _SLOWER_THAN_EXPECTED * expected)

    # --- the lanes --------------------------------------------------------------------------------------

    def _lane(self, backend: Backend, lane: int) -> None:
        try:
            while (batch := self._next_batch(lane)) is not None:
                self._run(backend, batch, lane)
        except BaseException as error:  # whatever it is, it ends this model's lanes and nothing else
            self._end_lanes(lane, error)
            logger.exception("model %s: its thread %d ended", self._model, lane)
        finally:
            self._running[lane] = None

    def _end_lanes(self, lane: int, error: BaseException) -> None:
        with self._wake:
            running = self._running[lane]
            if running is not None:
                self._accepted.suspect(job for job, _ in running.batch.members)
            if self._crash is None:
                self._crash = error
                self._accepted.strand()
                if self._batcher is not None:
                    self._batcher = self._batcher.emptied()
            self._wake.notify_all()

    def _next_batch(self, lane: int) -> Batch[EmbeddingJob] | None:
        with self._wake:
            while lane and self._accepted.quarantine and self._crash is None:
                self._wake.wait()
            self._idle += 1
            while True:
                if self._crash is not None or self._batcher is None:
                    return None
                now = time.monotonic()
                decision = self._batcher.next_batch(now, idle_lanes=self._idle, may_wait=not self._stopping)
                if isinstance(decision, Batch):
                    break
                if decision is None and self._stopping:
                    self._idle -= 1
                    return None
                self._wake.wait(None if decision is None else decision - now)
            self._idle -= 1
            self._running[lane] = _Running(now, decision)
            for job, _ in decision.members:
                if job.started_at is None:
                    job.started_at = now
            return decision

    def _run(self, backend: Backend, batch: Batch[EmbeddingJob], lane: int) -> None:
        started = time.monotonic()
        outcome = run_isolated(self._model, backend, batch.members)
        if outcome.failures:
            # Is it the inputs, or can the model do nothing any more? Then they are no more at fault than others.
            self._check(backend)
        ended = time.monotonic()
        if outcome.out_of_memory is not None:
            self._lower_budget(outcome.out_of_memory // 2, until=ended + _LOWERED_BUDGET_S)
        # Counted before it is answered: whoever has an answer finds it in the figures.
        self._count(
            BatchRecord(
                model=self._model,
                inputs=len(batch.members),
                tokens=batch.tokens,
                padded_tokens=batch.padded_tokens,
                inference_s=ended - started,
                queue_s=started - min(job.arrived_at for job, _ in batch.members),
                failed=bool(outcome.failures),
            )
        )
        for job, _ in outcome.failures:
            self.cancel(job)
        self._finish(lane, batch, ended, took=ended - started)
        for job, error in outcome.failures:
            refuse(job, error)

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
            self._model, padded_tokens, _LOWERED_BUDGET_S,
        )  # fmt: skip

    def _finish(self, lane: int, batch: Batch[EmbeddingJob], ended: float, *, took: float) -> None:
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
            self._running[lane] = None
        answer(done)

    def _forget(self, job: EmbeddingJob) -> None:
        """Let go of a job that is answered, or that nobody awaits; with the last suspect the other lanes go on."""
        if self._accepted.forget(job):
            self._wake.notify_all()
