"""Downloads that go on while their callers do something else: started, watched and cancelled as jobs."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal

from emb_model_provider.errors import FetchCancelledError, JobNotFoundError, ProviderError, QueueFullError
from emb_model_provider.hubs.transfer import ProgressReporter
from emb_model_provider.model_resolver import resolve_source

if TYPE_CHECKING:
    from pathlib import Path

    from emb_model_provider.hubs.base import Progress
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.model_spec import HubName, ModelSpec


logger = logging.getLogger(__name__)

_MOST_RUNNING = 2
"""More side by side share one line to the hub, and each ends later."""
_MOST_QUEUED = 100
_MOST_ENDED = 100
"""How many jobs that ended are remembered."""
_QUEUE_RETRY_AFTER_S = 60.0


class DownloadJobs:
    """The downloads of one service. Safe to use from several threads; each runs on a thread of its own."""

    def __init__(self, manager: ModelManager) -> None:
        self._manager = manager
        self._lock = threading.Lock()
        self._jobs: dict[str, Download] = {}
        """In the order in which they were asked for."""
        self._stopping = False

    def start(self, spec: ModelSpec, *, force: bool = False, compiling: bool = False) -> Job:
        """Begin to fetch a model, and to compile it if `compiling`, or join the job that does so already.

        `force` asks the hub again though the files are here; a job that does not is not joined then.

        Raises: QueueFullError.
        """
        asked = Download(spec, force=force, compiling=compiling)
        with self._lock:
            for job in self._jobs.values():
                if job.does_the_same_as(asked):
                    return job.view()
            if sum(job.state == "queued" for job in self._jobs.values()) >= _MOST_QUEUED:
                raise QueueFullError(
                    f"{_MOST_QUEUED} downloads wait already: ask again later, or cancel some.",
                    retry_after_s=_QUEUE_RETRY_AFTER_S,
                )
            self._jobs[asked.id] = asked
            self._begin_waiting()
            return asked.view()

    def get(self, job_id: str) -> Job:
        """Raises: JobNotFoundError."""
        with self._lock:
            return self._found(job_id).view()

    def list(self) -> list[Job]:
        """Return all jobs that are remembered, the latest first."""
        with self._lock:
            return [job.view() for job in reversed(self._jobs.values())]

    def cancel(self, job_id: str) -> Job:
        """Ask a job to end; one that waits ends at once, one that is over stays as it is.

        One that runs ends within moments where bytes come, else as soon as the hub's client gives up.

        Raises: JobNotFoundError.
        """
        with self._lock:
            job = self._found(job_id)
            self._cancel(job)
            self._begin_waiting()
            return job.view()

    def stop(self, within_s: float) -> None:
        """Cancel all jobs and take no more. Waits at most this long, in seconds, for them to tidy up."""
        with self._lock:
            self._stopping = True
            for job in list(self._jobs.values()):
                self._cancel(job)
            threads = [job.thread for job in self._jobs.values() if job.thread is not None]
        give_up_at = time.monotonic() + within_s
        for thread in threads:
            thread.join(max(0.0, give_up_at - time.monotonic()))

    # --- under the lock -------------------------------------------------------------------------------

    def _found(self, job_id: str) -> Download:
        job = self._jobs.get(job_id)
        if job is None:
            raise JobNotFoundError(
                f"There is no job {job_id[:100]!r}: it ended long ago, or before the service was started anew. "
                "GET /api/models/jobs lists those there are."
            )
        return job

    def _cancel(self, job: Download) -> None:
        job.cancelled.set()
        if job.state == "queued":
            self._end(job, "cancelled")

    def _begin_waiting(self) -> None:
        # One that was cancelled moves no more bytes, and may hang for as long as its hub does: others pass it by.
        running = sum(job.state == "running" and not job.cancelled.is_set() for job in self._jobs.values())
        for job in self._jobs.values():
            if running >= _MOST_RUNNING or self._stopping:
                return
            if job.state == "queued":
                running += 1
                job.state, job.started = "running", now_utc()
                # A daemon: a transfer that hangs must not hold up the end of the process.
                job.thread = threading.Thread(
                    target=self._run, args=(job,), name=f"download-{job.id}", daemon=True
                )
                job.thread.start()

    def _end(self, job: Download, state: JobState, failure: BaseException | None = None) -> None:
        job.state, job.ended, job.thread, job.failure = state, now_utc(), None, failure
        over = [each.id for each in self._jobs.values() if each.is_over]
        for old in over[: max(0, len(over) - _MOST_ENDED)]:
            del self._jobs[old]

    # --- on a job's thread ----------------------------------------------------------------------------

    def _run(self, job: Download) -> None:
        logger.info("job %s: fetching %s from %s", job.id, job.spec.name, job.source)
        state: JobState = "failed"
        failure: BaseException | None = None
        try:
            self._fetch(job)
            state = "done"
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the job's, and its place is free again
            # However the work puts it that it was stopped, that was asked for.
            if job.cancelled.is_set():
                state = "cancelled"
            else:
                failure = error
        with self._lock:
            self._end(job, state, failure)
            self._begin_waiting()
        if isinstance(failure, ProviderError):
            logger.error("job %s: %s could not be had: %s", job.id, job.spec.name, failure)
        elif failure is not None:
            logger.error("job %s: %s could not be had", job.id, job.spec.name, exc_info=failure)
        else:
            logger.info("job %s: %s: %s", job.id, job.spec.name, state)

    def _fetch(self, job: Download) -> None:
        with ProgressReporter() as report:

            def on_progress(progress: Progress) -> None:
                if job.cancelled.is_set():
                    raise FetchCancelledError(f"The download of {job.spec.name} was cancelled.")
                with self._lock:
                    job.note(progress.phase, progress.done_bytes, progress.total_bytes)
                report(progress)

            def on_compiling() -> None:
                with self._lock:
                    job.note("compile", 0, None)

            snapshot = None
            if job.force or not job.compiling:
                snapshot = self._manager.ensure(job.spec, force=job.force, on_progress=on_progress)
            if job.compiling:
                compiled = self._manager.compile(
                    job.spec,
                    on_progress=on_progress,
                    on_compiling=on_compiling,
                    stopped=job.cancelled.is_set,
                )
                snapshot = compiled.snapshot
                with self._lock:
                    job.notes = tuple(compiled.notes)
        if snapshot is not None:
            with self._lock:
                job.source, job.revision, job.path = snapshot.hub, snapshot.revision, snapshot.path


JobState = Literal["queued", "running", "done", "failed", "cancelled"]
Phase = Literal["resolve", "download", "verify", "compile"]

_SPEED_OVER_S = 5.0
_SAMPLE_EVERY_S = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A download as it was at one moment."""

    id: str
    state: JobState
    model_name: str
    source: HubName
    """The hub that is asked first, or, once it is done, the one that the files came from."""
    asked_revision: str | None
    revision: str | None
    """Resolved; None until it is known."""
    force: bool
    compile: bool
    precision: str | None
    """What it is compiled at; None where it is not."""
    phase: Phase | None
    """None before it begins; that in which it ended, once it has."""
    done_bytes: int
    total_bytes: int | None
    bytes_per_s: float | None
    """Over the last seconds, 0 where nothing comes; None while nothing is transferred."""
    cancelling: bool
    """It was cancelled, and is about to end."""
    error: str | None
    """Why it failed, and what to do."""
    failure: BaseException | None
    """The error whose words `error` has."""
    created: datetime
    started: datetime | None
    ended: datetime | None
    path: Path | None
    """The snapshot's directory, once it is there."""
    notes: tuple[str, ...]
    """What to know of how it was compiled."""

    @property
    def is_over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")


class Download:
    """A download that was asked for. What changes is read and written under the lock of `DownloadJobs`."""

    def __init__(self, spec: ModelSpec, *, force: bool, compiling: bool) -> None:
        self.id = secrets.token_hex(6)
        self.spec = spec
        self.force = force
        self.compiling = compiling
        self.cancelled = threading.Event()
        self.thread: threading.Thread | None = None
        self.state: JobState = "queued"
        self.source = resolve_source(spec)
        self.revision: str | None = None
        self.phase: Phase | None = None
        self.done_bytes = 0
        self.total_bytes: int | None = None
        self.failure: BaseException | None = None
        self.created = now_utc()
        self.started: datetime | None = None
        self.ended: datetime | None = None
        self.path: Path | None = None
        self.notes: tuple[str, ...] = ()
        self._samples: deque[tuple[float, int]] = deque()
        """Moments, monotonic, and the bytes that were there."""
        self._moved_at = 0.0

    @property
    def is_over(self) -> bool:
        return self.ended is not None

    def does_the_same_as(self, other: Download) -> bool:
        """Whether this job, which is on its way, makes another one unnecessary."""
        if self.is_over or self.cancelled.is_set() or other.force > self.force:
            return False
        mine, others = self.spec, other.spec
        same_files = (self.source, mine.name, mine.path, mine.revision, mine.endpoint, mine.cache_dir) == (
            other.source, others.name, others.path, others.revision, others.endpoint, others.cache_dir,
        )  # fmt: skip
        if not self.compiling or not other.compiling:
            return same_files and self.compiling == other.compiling
        return replace(mine, alias="", token=None) == replace(others, alias="", token=None)

    def note(self, phase: Phase, done_bytes: int, total_bytes: int | None) -> None:
        now = time.monotonic()
        if phase != self.phase:
            self._samples.clear()
        if not self._samples or done_bytes != self.done_bytes:
            self._moved_at = now
        self.phase, self.done_bytes, self.total_bytes = phase, done_bytes, total_bytes
        if not self._samples or now - self._samples[-1][0] >= _SAMPLE_EVERY_S:
            self._samples.append((now, done_bytes))
        self._forget_old_samples(now)

    def view(self) -> Job:
        return Job(
            id=self.id,
            state=self.state,
            model_name=self.spec.name,
            source=self.source,
            asked_revision=self.spec.revision,
            revision=self.revision,
            force=self.force,
            compile=self.compiling,
            precision=self.spec.precision if self.compiling else None,
            phase=self.phase,
            done_bytes=self.done_bytes,
            total_bytes=self.total_bytes,
            bytes_per_s=self._speed(),
            cancelling=self.cancelled.is_set() and not self.is_over,
            error=_words(self.failure) if self.failure is not None else None,
            failure=self.failure,
            created=self.created,
            started=self.started,
            ended=self.ended,
            path=self.path,
            notes=self.notes,
        )

    def _speed(self) -> float | None:
        if self.state != "running" or self.phase not in ("download", "verify"):
            return None
        now = time.monotonic()
        if now - self._moved_at >= _SPEED_OVER_S:
            return 0.0
        self._forget_old_samples(now)
        since, done_bytes = self._samples[0]
        return max(0.0, (self.done_bytes - done_bytes) / max(now - since, _SAMPLE_EVERY_S))

    def _forget_old_samples(self, now: float) -> None:
        while len(self._samples) > 1 and self._samples[1][0] <= now - _SPEED_OVER_S:
            self._samples.popleft()


def now_utc() -> datetime:
    return datetime.now(UTC)


def _words(error: BaseException) -> str:
    if isinstance(error, ProviderError):
        return error.message
    details = str(error).splitlines()[0] if str(error) else "no details"
    return f"{type(error).__name__}: {details}"
