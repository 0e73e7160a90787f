"""The threads that own a model. Everybody else sends them jobs and gets futures.

A lane is a thread that runs batches. What goes wrong with an input fails that input (see `isolation.py`). What goes
wrong otherwise, in a lane's own code or because the model answers nothing any more, ends all lanes of this model, and
only of this one: the backend is closed and loaded anew, and the jobs that had no answer run again. A model that keeps
failing gives up, and whoever waits for it hears why.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from emb_model_provider.errors import InferenceError, ModelNotReadyError, QueueFullError
from emb_model_provider.serving.batcher import Batch, Batcher, BatchPolicy
from emb_model_provider.serving.isolation import run_isolated
from emb_model_provider.serving.jobs import BatchRecord, EmbeddingJob, Timing, answer, refuse

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.backends.base import Backend, ModelDescription

logger = logging.getLogger(__name__)

Change = Literal["restarting", "running", "failed"]
"""What becomes of a model whose lanes ended: it is loaded anew, it runs again, it is given up."""

_QUEUE_SECONDS = 20.0
_ASSUMED_TOKENS_PER_S = 5_000.0
"""Until the first batches have been measured."""
_RATE_SMOOTHING = 0.1
_DRAIN_RETRY_AFTER_S = 5.0
_FAILED_RETRY_AFTER_S = 30.0
_MOST_RESTARTS, _RESTART_WINDOW_S = 3, 600.0
_RESTART_PAUSES_S = (0.0, 1.0, 4.0)
"""Before the first, second and third restart within the window."""
_MOST_ATTEMPTS = 2
"""A job that was in a batch whose lane ended is tried once more; it may be what ends them."""
_LOWERED_BUDGET_S = 60.0
"""How long batches stay small after one was too large for the memory."""
_SLOWER_THAN_EXPECTED = 10.0
"""A batch that takes this many times as long as its tokens should, and the watchdog's limit, counts as hung."""


@dataclass(frozen=True, slots=True)
class _Running:
    """A batch that a lane has in hand."""

    since: float
    batch: Batch[EmbeddingJob]


class Worker:
    """Runs one model on threads of its own: one creates and closes the backend, one a lane calls `embed`."""

    def __init__(
        self,
        model: str,
        load: Callable[[], Backend],
        policy_for: Callable[[ModelDescription], BatchPolicy],
        *,
        check: Callable[[Backend], object],
        max_queue_tokens: int | None,
        watchdog_s: float,
        on_batch: Callable[[BatchRecord], None],
        on_change: Callable[[Change, str], None],
    ) -> None:
        """Prepare the threads.

        `load` is called again where the model has to be loaded anew. `check` raises where a backend cannot answer at
        all. `on_change` gets a reason, which is empty for `running`. All are called on the model's threads.
        """
        self._model = model
        self._load = load
        self._policy_for = policy_for
        self._check = check
        self._max_queue_tokens = max_queue_tokens
        self._watchdog_s = watchdog_s
        self._on_batch = on_batch
        self._on_change = on_change
        self._wake = threading.Condition()
        """Guards all that follows, and the jobs' counts; idle lanes wait on it."""
        self._batcher: Batcher[EmbeddingJob] | None = None
        self._jobs: set[EmbeddingJob] = set()
        """Those that were accepted and not answered, and are the present batcher's."""
        self._stranded: set[EmbeddingJob] = set()
        """Those of the batcher whose lanes ended: they run again once the model is back."""
        self._idle = 0
        self._running: list[_Running | None] = [None]
        """What each lane has in hand."""
        self._stopping = False
        self._crash: BaseException | None = None
        self._failed = ""
        self._restarts: list[float] = []
        self._lane_tokens_per_s = _ASSUMED_TOKENS_PER_S
        self._owner = threading.Thread(target=self._main, name=f"model-{model}", daemon=True)
        self._loaded: Future[ModelDescription] = Future()

    def start(self) -> Future[ModelDescription]:
        """Start the threads; the future is done once the model is loaded, or carries why it is not."""
        self._owner.start()
        return self._loaded

    def submit(self, job: EmbeddingJob) -> None:
        """Queue a job; its `result` will be set. Called on the job's event loop.

        Raises: QueueFullError; ModelNotReadyError once `stop` was called, while all lanes hang, or where the model
        was given up.
        """
        with self._wake:
            if self._failed:
                raise self._given_up()
            if self._stopping or self._batcher is None:
                raise ModelNotReadyError(
                    f"The model `{self._model}` is being stopped: ask again later.",
                    retry_after_s=_DRAIN_RETRY_AFTER_S,
                )
            now = time.monotonic()
            if all(running is not None and self._hangs(running, now) for running in self._running):
                raise ModelNotReadyError(
                    f"The model `{self._model}` hangs: {self.hung}. Ask again later.",
                    retry_after_s=_FAILED_RETRY_AFTER_S,
                )
            waiting = self._batcher.waiting_tokens
            limit = self.max_queue_tokens
            # An empty queue takes any request, or one over the limit could never be answered.
            if waiting and waiting + job.waiting_tokens > limit:
                # The queue has room once enough of it has run; at the latest when it is empty.
                too_many = min(waiting, waiting + job.waiting_tokens - limit)
                raise QueueFullError(
                    f"The queue of model `{self._model}` is full ({waiting} tokens wait). Ask again later.",
                    retry_after_s=too_many / self._tokens_per_s,
                )
            job.arrived_at = now
            self._jobs.add(job)
            self._batcher.submit(job)
            if self._idle:
                self._wake.notify(len(job.ids))

    def cancel(self, job: EmbeddingJob) -> None:
        """Drop what still waits of a job that nobody awaits any more."""
        with self._wake:
            if job in self._stranded:
                self._stranded.discard(job)
                job.cancelled = True
            elif self._batcher is not None:
                self._jobs.discard(job)
                self._batcher.cancel(job)

    def stop(self, timeout_s: float | None = None) -> bool:
        """Take no more jobs, finish those that were taken, close the backend. Blocks until that is done.

        Returns False where it was not done within `timeout_s` seconds: a lane hangs.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        if self._owner.is_alive():
            self._owner.join(timeout_s)
        return not self._owner.is_alive()

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

    def _given_up(self) -> ModelNotReadyError:
        return ModelNotReadyError(
            f"The model `{self._model}` failed: {self._failed}", retry_after_s=_FAILED_RETRY_AFTER_S
        )

    # --- the thread that owns the backend ---------------------------------------------------------------

    def _main(self) -> None:
        try:
            backend = self._load()
            with self._wake:
                self._running = [None] * backend.lanes
                self._batcher = Batcher(self._policy_for(backend.description))
        except BaseException as error:  # noqa: BLE001 - whatever it is, whoever waits for the model must hear it
            self._loaded.set_exception(error)
            return
        self._loaded.set_result(backend.description)
        returned: Backend | None = backend
        while returned is not None:
            backend = returned
            self._run_lanes(backend)
            try:
                backend.close()
            except BaseException:
                logger.exception("model %s could not be closed in good order", self._model)
            returned = self._load_anew() if self._crash is not None else None

    def _run_lanes(self, backend: Backend) -> None:
        """Run batches on all lanes, this thread's included, until they are told to stop or one of them ends."""
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

    def _load_anew(self) -> Backend | None:
        """Return the model loaded once more, with the stranded jobs in its queue; None where it is given up."""
        reason = _in_a_line(self._crash)
        while True:
            now = time.monotonic()
            self._restarts = [then for then in self._restarts if now - then < _RESTART_WINDOW_S]
            if len(self._restarts) >= _MOST_RESTARTS:
                self._give_up(
                    f"{reason} It was loaded anew {_MOST_RESTARTS} times within {_RESTART_WINDOW_S / 60:.0f} minutes."
                )
                return None
            pause_s = _RESTART_PAUSES_S[len(self._restarts)]
            self._restarts.append(now)
            logger.error("model %s is loaded anew: %s", self._model, reason)
            self._on_change("restarting", reason)
            time.sleep(pause_s)
            try:
                backend = self._load()
            except BaseException as error:  # noqa: BLE001 - it counts as a restart, and is told as the reason
                reason = _in_a_line(error)
                continue
            self._take_up(backend)
            logger.warning("model %s is back", self._model)
            self._on_change("running", "")
            return backend

    def _take_up(self, backend: Backend) -> None:
        """Let the lanes of a model that was loaded anew have what was not answered."""
        with self._wake:
            batcher = self._batcher
            if batcher is None:
                raise RuntimeError("a model that was loaded has a queue")
            self._crash = None
            self._idle = 0
            self._running = [None] * backend.lanes
            for job in sorted(self._stranded, key=lambda job: job.arrived_at):
                if job.attempts >= _MOST_ATTEMPTS:
                    refuse(job, InferenceError("The model ended twice while it ran inputs of this request."))
                    continue
                job.begin_again()
                batcher.submit(job)
                self._jobs.add(job)
            self._stranded.clear()

    def _give_up(self, reason: str) -> None:
        with self._wake:
            self._failed = reason
            left = self._stranded | self._jobs
            self._stranded, self._jobs = set(), set()
        logger.error("model %s is given up: %s", self._model, reason)
        self._on_change("failed", reason)
        for job in left:
            refuse(job, self._given_up())

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
            for job in {job for job, _ in running.batch.members} if running is not None else ():
                job.attempts += 1
            if self._crash is None:
                self._crash = error
                self._stranded, self._jobs = self._jobs, set()
                if self._batcher is not None:
                    self._batcher = self._batcher.emptied()
            self._wake.notify_all()

    def _next_batch(self, lane: int) -> Batch[EmbeddingJob] | None:
        with self._wake:
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
                    self._jobs.discard(job)
                    self._stranded.discard(job)
                    started = job.started_at if job.started_at is not None else job.arrived_at
                    done.append((job, Timing(queue_s=started - job.arrived_at, inference_s=ended - started)))
            self._running[lane] = None
        answer(done)


def _in_a_line(error: BaseException | None) -> str:
    words = str(error).strip().splitlines() if error is not None else []
    reason = f"{type(error).__name__}: {words[0]}" if words else type(error).__name__
    return reason if reason.endswith(".") else f"{reason}."
