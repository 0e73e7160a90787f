"""Downloads, and transfers to other hubs, in the background: started, watched and cancelled as jobs."""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

from emb_model_provider.concurrency import ForkGuard, start_thread
from emb_model_provider.error_table import error_info
from emb_model_provider.errors import JobNotFoundError, ProviderError, QueueFullError, ThreadLimitError
from emb_model_provider.formatting import describe_error
from emb_model_provider.management.types import DownloadRecord
from emb_model_provider.model_resolver import resolve_source
from emb_model_provider.progress import CancelToken, OnProgress, ProgressReporter, RateMeter

if TYPE_CHECKING:
    import builtins

    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.management.types import JobPhase, JobState
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.progress import Progress

logger = logging.getLogger(__name__)

_MAX_RUNNING = 2
"""More in parallel share one network connection, and each ends later."""
_MAX_QUEUED = 100
_MAX_ENDED = 100
"""How many ended jobs are remembered."""
_RETRY_AFTER_S = 60.0
_FILES = attrgetter("record.source", "spec.name", "spec.path", "spec.revision", "spec.cache_dir")
"""What determines the files that a job downloads."""
_TRANSFER = attrgetter(
    "record.kind", "record.source", "record.model_name", "record.asked_revision", "record.destination"
)

Work = Callable[[OnProgress, CancelToken], Mapping[str, Any]]
"""Does the work of a job, and returns the fields of its record that are known when it is done."""


class DownloadJobs:
    """The downloads and transfers of one service. Thread-safe; each job runs on a thread of its own."""

    def __init__(self, manager: ModelManager) -> None:
        self._manager = manager
        self._guard = ForkGuard("The jobs were created")
        self._lock = threading.Lock()
        self._jobs: dict[str, _Job] = {}
        """In the order in which they were requested."""
        self._is_stopping = False

    def start(self, spec: ModelSpec, *, force: bool = False, compiling: bool = False) -> DownloadRecord:
        """Start to download a model, or return the job that already does so. `force` asks the hub in any case."""
        job = _Job(
            partial(self._download, spec, force, compiling),
            spec,
            kind="download",
            model_name=spec.name,
            source=resolve_source(spec),
            asked_revision=spec.revision,
            force=force,
            compile=compiling,
            precision=spec.precision if compiling else None,
        )
        return self._start(job)

    def start_transfer(
        self, work: Work, *, model_name: str, source: str, asked_revision: str | None, destination: str
    ) -> DownloadRecord:
        """Start a transfer to another hub, or return the job that already does so."""
        job = _Job(
            work,
            None,
            kind="transfer",
            model_name=model_name,
            source=source,
            asked_revision=asked_revision,
            destination=destination,
        )
        return self._start(job)

    def _start(self, requested: _Job) -> DownloadRecord:
        self._guard.check()
        with self._lock:
            for job in self._jobs.values():
                if job.covers(requested):
                    return job.report()
            if sum(job.record.state == "queued" for job in self._jobs.values()) >= _MAX_QUEUED:
                raise QueueFullError(
                    f"{_MAX_QUEUED} downloads are waiting already: try again later, or cancel some.",
                    retry_after_s=_RETRY_AFTER_S,
                )
            self._jobs[requested.record.id] = requested
            self._start_queued()
            return requested.report()

    def get(self, job_id: str) -> DownloadRecord:
        self._guard.check()
        with self._lock:
            return self._find(job_id).report()

    def list(self) -> list[DownloadRecord]:
        """Return all jobs that are remembered, the latest first."""
        self._guard.check()
        with self._lock:
            return [job.report() for job in reversed(self._jobs.values())]

    def running_downloads(self) -> builtins.list[tuple[ModelSpec, DownloadRecord]]:
        """Return the models that are being downloaded, or that wait for it."""
        with self._lock:
            jobs = [job for job in self._jobs.values() if not (job.record.is_over or job.cancel.is_cancelled)]
            return [(job.spec, job.report()) for job in jobs if job.spec is not None]

    def cancel(self, job_id: str) -> DownloadRecord:
        """Cancel a job. One that waits ends at once, one that runs ends soon, one that is over does not change."""
        self._guard.check()
        with self._lock:
            job = self._find(job_id)
            self._cancel(job)
            self._start_queued()
            return job.report()

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
        if job.record.state == "queued":
            self._end(job, "cancelled")

    def _start_queued(self) -> None:
        # A cancelled job is not counted, because it transfers nothing but can hang for as long as its hub does.
        running = sum(job.record.state == "running" and not job.cancel.is_cancelled for job in self._jobs.values())
        for job in list(self._jobs.values()):
            if running >= _MAX_RUNNING or self._is_stopping:
                return
            if job.record.state == "queued":
                job.record.state, job.record.started = "running", _now()
                # A daemon, so that a transfer that hangs does not delay the end of the process.
                job.thread = threading.Thread(
                    target=self._run, args=(job,), name=f"{job.record.kind}-{job.record.id}", daemon=True
                )
                try:
                    start_thread(job.thread)
                    running += 1
                except ThreadLimitError as error:
                    logger.error("job %s: %s failed: %s", job.record.id, job.record.model_name, error)  # noqa: TRY400
                    self._end(job, "failed", error)

    def _end(self, job: _Job, state: JobState, failure: BaseException | None = None) -> None:
        job.thread = None
        job.record.state, job.record.ended = state, _now()
        if failure is not None:
            job.record.error, job.record.error_code = describe_error(failure), error_info(failure).code
        over = [each.record.id for each in self._jobs.values() if each.record.is_over]
        for old in over[: max(0, len(over) - _MAX_ENDED)]:
            del self._jobs[old]

    # --- on the thread of a job -----------------------------------------------------------------------

    def _run(self, job: _Job) -> None:
        job_id, name = job.record.id, job.record.model_name
        logger.info("job %s: %s of %s from %s", job_id, job.record.kind, name, job.record.source)
        state: JobState = "done"
        failure: BaseException | None = None
        try:
            self._work(job)
        except BaseException as error:  # noqa: BLE001 - any error fails the job, and must not block others
            if job.cancel.is_cancelled:
                state = "cancelled"
            else:
                state, failure = "failed", error
        with self._lock:
            self._end(job, state, failure)
            self._start_queued()
        if failure is None:
            logger.info("job %s: %s: %s", job_id, name, state)
        else:
            trace = None if isinstance(failure, ProviderError) else failure
            logger.error("job %s: %s failed: %s", job_id, name, describe_error(failure), exc_info=trace)

    def _work(self, job: _Job) -> None:
        with ProgressReporter("log") as report:

            def on_progress(progress: Progress) -> None:
                with self._lock:
                    job.update(progress)
                report(progress)

            results = job.work(on_progress, job.cancel)
        with self._lock:
            for name, value in results.items():
                setattr(job.record, name, value)

    def _download(
        self, spec: ModelSpec, force: bool, compiling: bool, on_progress: OnProgress, cancel: CancelToken
    ) -> Mapping[str, Any]:
        notes: tuple[str, ...] = ()
        if force or not compiling:
            snapshot = self._manager.ensure(spec, force=force, on_progress=on_progress, cancel=cancel)
        if compiling:
            compiled = self._manager.compile(spec, on_progress=on_progress, cancel=cancel)
            snapshot, notes = compiled.snapshot, compiled.notes
        return {"source": snapshot.hub, "revision": snapshot.revision, "path": str(snapshot.path), "notes": list(notes)}


class _Job:
    """A download or a transfer. It is read and changed with the lock of `DownloadJobs` held."""

    def __init__(self, work: Work, spec: ModelSpec | None, **values: Any) -> None:
        """Create a job; `spec` is the model of a download, and `values` are fields of the record."""
        self.work = work
        self.spec = spec
        self.cancel = CancelToken()
        self.thread: threading.Thread | None = None
        empty: dict[str, Any] = dict.fromkeys(DownloadRecord.model_fields)
        flags = {"force": False, "compile": False, "cancelling": False, "done_bytes": 0, "notes": []}
        identity = {"id": secrets.token_hex(6), "state": "queued", "created": _now()}
        self.record = DownloadRecord(**{**empty, **flags, **identity, **values})
        self._transferred_bytes = 0
        self._rate = RateMeter(0, time.monotonic())

    def covers(self, other: _Job) -> bool:
        """Return whether this job is not over and does what another one would do."""
        if self.record.is_over or self.cancel.is_cancelled or other.record.force > self.record.force:
            return False
        if self.spec is None or other.spec is None:
            return bool(_TRANSFER(self) == _TRANSFER(other))
        if not self.record.compile or not other.record.compile:
            return self.record.compile == other.record.compile and bool(_FILES(self) == _FILES(other))
        return _without_access(self.spec) == _without_access(other.spec)

    def update(self, progress: Progress) -> None:
        now = time.monotonic()
        phase = cast("JobPhase", "compile" if progress.phase in ("compare", "load") else progress.phase)
        if phase != self.record.phase:
            self._rate = RateMeter(progress.transferred_bytes, now)
        self._rate.update(progress.transferred_bytes, now)
        self._transferred_bytes = progress.transferred_bytes
        self.record.phase = phase
        self.record.done_bytes, self.record.total_bytes = progress.done_bytes, progress.total_bytes
        self.record.step_number, self.record.step_count = progress.step_number, progress.step_count
        self.record.seconds_left = progress.seconds_left

    def report(self) -> DownloadRecord:
        """Return a copy of the record, with the rate at this moment."""
        bytes_per_s = None
        if self.record.state == "running" and self.record.phase in ("download", "transfer", "verify"):
            self._rate.update(self._transferred_bytes, time.monotonic())
            bytes_per_s = self._rate.bytes_per_s
        cancelling = self.cancel.is_cancelled and not self.record.is_over
        return self.record.model_copy(update={"bytes_per_s": bytes_per_s, "cancelling": cancelling})


def _without_access(spec: ModelSpec) -> ModelSpec:
    """Return a model without what does not determine its files: its alias, and how its hub is reached."""
    return replace(spec, alias="", token=None, endpoint=None)


def _now() -> datetime:
    return datetime.now(UTC)
