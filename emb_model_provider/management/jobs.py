"""Downloads that go on while their callers do something else: started, watched and cancelled as jobs."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from emb_model_provider.errors import FetchCancelledError, JobNotFoundError, ProviderError, QueueFullError
from emb_model_provider.hubs.progress import ProgressReporter
from emb_model_provider.management.job import Download, now_utc

if TYPE_CHECKING:
    from emb_model_provider.hubs.base import Progress
    from emb_model_provider.management.job import Job, JobState
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.model_spec import ModelSpec

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
