"""Downloads in the background: started, watched and cancelled as jobs."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from dataclasses import replace
from datetime import UTC, datetime
from operator import attrgetter
from typing import TYPE_CHECKING, cast

from emb_model_provider.error_table import error_info
from emb_model_provider.errors import JobNotFoundError, ProviderError, QueueFullError
from emb_model_provider.formatting import describe_error
from emb_model_provider.management.types import DownloadRecord
from emb_model_provider.model_resolver import resolve_source
from emb_model_provider.progress import CancelToken
from emb_model_provider.progress_reporter import ProgressReporter, RateMeter

if TYPE_CHECKING:
    from pathlib import Path

    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.management.types import JobPhase, JobState
    from emb_model_provider.model_spec import HubName, ModelSpec
    from emb_model_provider.progress import Progress

logger = logging.getLogger(__name__)

_MAX_RUNNING = 2
"""More in parallel share one network connection, and each ends later."""
_MAX_QUEUED = 100
_MAX_ENDED = 100
"""How many ended jobs are remembered."""
_RETRY_AFTER_S = 60.0
_FILES = attrgetter("source", "spec.name", "spec.path", "spec.revision", "spec.endpoint", "spec.cache_dir")
"""What determines the files that a job downloads."""


class DownloadJobs:
    """The downloads of one service. Thread-safe; each job runs on a thread of its own."""

    def __init__(self, manager: ModelManager) -> None:
        self._manager = manager
        self._lock = threading.Lock()
        self._jobs: dict[str, _Job] = {}
        """In the order in which they were requested."""
        self._is_stopping = False

    def start(self, spec: ModelSpec, *, force: bool = False, compiling: bool = False) -> DownloadRecord:
        """Start to download a model, or return the job that already does so.

        Args:
            spec: The model.
            force: Ask the hub even if the files are on disk.
            compiling: Compile the model after the download.
        """
        requested = _Job(spec, force=force, compiling=compiling)
        with self._lock:
            for job in self._jobs.values():
                if job.covers(requested):
                    return job.record()
            if sum(job.state == "queued" for job in self._jobs.values()) >= _MAX_QUEUED:
                raise QueueFullError(
                    f"{_MAX_QUEUED} downloads are waiting already: try again later, or cancel some.",
                    retry_after_s=_RETRY_AFTER_S,
                )
            self._jobs[requested.id] = requested
            self._start_queued()
            return requested.record()

    def get(self, job_id: str) -> DownloadRecord:
        with self._lock:
            return self._find(job_id).record()

    def list(self) -> list[DownloadRecord]:
        """Return all jobs that are remembered, the latest first."""
        with self._lock:
            return [job.record() for job in reversed(self._jobs.values())]

    def cancel(self, job_id: str) -> DownloadRecord:
        """Cancel a job. One that waits ends at once, one that runs ends soon, one that is over does not change."""
        with self._lock:
            job = self._find(job_id)
            self._cancel(job)
            self._start_queued()
            return job.record()

    def stop(self, within_s: float) -> None:
        """Cancel all jobs, and start no new ones. Waits for running jobs to end for at most `within_s` seconds."""
        with self._lock:
            self._is_stopping = True
            for job in list(self._jobs.values()):
                self._cancel(job)
            threads = [job.thread for job in self._jobs.values() if job.thread is not None]
        deadline = time.monotonic() + within_s
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    # --- with the lock held ---------------------------------------------------------------------------

    def _find(self, job_id: str) -> _Job:
        job = self._jobs.get(job_id)
        if job is None:
            raise JobNotFoundError(
                f"There is no job {job_id[:100]!r}: it ended long ago, or before the service was restarted. "
                "GET /api/models/jobs lists the jobs."
            )
        return job

    def _cancel(self, job: _Job) -> None:
        job.cancel.cancel()
        if job.state == "queued":
            self._end(job, "cancelled")

    def _start_queued(self) -> None:
        # A cancelled job is not counted, because it transfers nothing but can hang for as long as its hub does.
        running = sum(job.state == "running" and not job.cancel.is_cancelled for job in self._jobs.values())
        for job in self._jobs.values():
            if running >= _MAX_RUNNING or self._is_stopping:
                return
            if job.state == "queued":
                running += 1
                job.state, job.started = "running", _now()
                # A daemon, so that a transfer that hangs does not delay the end of the process.
                job.thread = threading.Thread(target=self._run, args=(job,), name=f"download-{job.id}", daemon=True)
                job.thread.start()

    def _end(self, job: _Job, state: JobState, failure: BaseException | None = None) -> None:
        job.state, job.ended, job.thread, job.failure = state, _now(), None, failure
        over = [each.id for each in self._jobs.values() if each.ended is not None]
        for old in over[: max(0, len(over) - _MAX_ENDED)]:
            del self._jobs[old]

    # --- on the thread of a job -----------------------------------------------------------------------

    def _run(self, job: _Job) -> None:
        logger.info("job %s: downloading %s from %s", job.id, job.spec.name, job.source)
        state: JobState = "done"
        failure: BaseException | None = None
        try:
            self._download(job)
        except BaseException as error:  # noqa: BLE001 - any error fails the job, and must not block others
            if job.cancel.is_cancelled:
                state = "cancelled"
            else:
                state, failure = "failed", error
        with self._lock:
            self._end(job, state, failure)
            self._start_queued()
        if failure is None:
            logger.info("job %s: %s: %s", job.id, job.spec.name, state)
        else:
            trace = None if isinstance(failure, ProviderError) else failure
            logger.error("job %s: %s failed: %s", job.id, job.spec.name, describe_error(failure), exc_info=trace)

    def _download(self, job: _Job) -> None:
        with ProgressReporter("log") as report:

            def on_progress(progress: Progress) -> None:
                with self._lock:
                    job.report(progress)
                report(progress)

            notes: tuple[str, ...] = ()
            if job.force or not job.compiling:
                snapshot = self._manager.ensure(job.spec, force=job.force, on_progress=on_progress, cancel=job.cancel)
            if job.compiling:
                compiled = self._manager.compile(job.spec, on_progress=on_progress, cancel=job.cancel)
                snapshot, notes = compiled.snapshot, compiled.notes
        with self._lock:
            job.source, job.revision, job.path, job.notes = snapshot.hub, snapshot.revision, snapshot.path, notes


class _Job:
    """A download. Its attributes are read and changed with the lock of `DownloadJobs` held."""

    def __init__(self, spec: ModelSpec, *, force: bool, compiling: bool) -> None:
        self.id = secrets.token_hex(6)
        self.spec = spec
        self.force = force
        self.compiling = compiling
        self.cancel = CancelToken()
        self.thread: threading.Thread | None = None
        self.state: JobState = "queued"
        self.source: HubName = resolve_source(spec)
        self.revision: str | None = None
        self.phase: JobPhase | None = None
        self.done_bytes = 0
        self.total_bytes: int | None = None
        self.failure: BaseException | None = None
        self.created = _now()
        self.started: datetime | None = None
        self.ended: datetime | None = None
        self.path: Path | None = None
        self.notes: tuple[str, ...] = ()
        self._rate = RateMeter(0, time.monotonic())

    def covers(self, other: _Job) -> bool:
        """Return whether this job is not over and does what another one would do."""
        if self.ended is not None or self.cancel.is_cancelled or other.force > self.force:
            return False
        if not self.compiling or not other.compiling:
            return self.compiling == other.compiling and _FILES(self) == _FILES(other)
        return replace(self.spec, alias="", token=None) == replace(other.spec, alias="", token=None)

    def report(self, progress: Progress) -> None:
        now = time.monotonic()
        phase = cast("JobPhase", "compile" if progress.phase in ("compare", "load") else progress.phase)
        if phase != self.phase:
            self._rate = RateMeter(progress.done_bytes, now)
        self.phase, self.done_bytes, self.total_bytes = phase, progress.done_bytes, progress.total_bytes
        self._rate.update(progress.done_bytes, now)

    def record(self) -> DownloadRecord:
        return DownloadRecord(
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
            bytes_per_s=self._bytes_per_s(),
            cancelling=self.cancel.is_cancelled and self.ended is None,
            error=describe_error(self.failure) if self.failure is not None else None,
            error_code=error_info(self.failure).code if self.failure is not None else None,
            created=self.created,
            started=self.started,
            ended=self.ended,
            path=str(self.path) if self.path is not None else None,
            notes=list(self.notes),
        )

    def _bytes_per_s(self) -> float | None:
        if self.state != "running" or self.phase not in ("download", "verify"):
            return None
        self._rate.update(self.done_bytes, time.monotonic())
        return self._rate.bytes_per_s


def _now() -> datetime:
    return datetime.now(UTC)
