"""Downloads as jobs, with a fake manager; tests/api has the real one."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.errors import HubUnavailableError, JobNotFoundError, QueueFullError
from emb_model_provider.management.downloads import DownloadJobs
from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.progress import Progress
from emb_model_provider.snapshots.snapshot import Snapshot
from tests.service import no_more_threads, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emb_model_provider.management.types import DownloadRecord
    from emb_model_provider.progress import CancelToken, OnProgress

SNAPSHOT = Snapshot.of("huggingface", "a/b", "c0ffee", Path("/models/a/b"), ())


@dataclass
class Compiled:
    snapshot: Snapshot = SNAPSHOT
    notes: tuple[str, ...] = ("a note",)


class PanicError(BaseException):
    """An error like those of libraries in Rust, which are not an Exception."""


@dataclass
class Manager:
    """A manager whose downloads wait for a semaphore at each step."""

    permits: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    downloads: list[str] = field(default_factory=list)
    compiled: list[str] = field(default_factory=list)
    failure: BaseException | None = None
    steps: tuple[tuple[int, int], ...] = ((0, 100), (100, 100))

    def ensure(self, spec: ModelSpec, *, force: bool, on_progress: OnProgress, cancel: CancelToken) -> Snapshot:
        self.downloads.append(spec.name)
        for done, total in self.steps:
            on_progress(Progress("download", spec.name, done, total))
            self.permits.acquire()
            cancel.raise_if_cancelled()
        on_progress(Progress("verify", spec.name, 100, 100))
        if self.failure is not None:
            raise self.failure
        return SNAPSHOT

    def compile(self, spec: ModelSpec, *, on_progress: OnProgress, cancel: CancelToken) -> Compiled:
        on_progress(Progress("compile", spec.name))
        while not self.permits.acquire(timeout=0.01):
            cancel.raise_if_cancelled()
        self.compiled.append(spec.name)
        return Compiled()

    def finish(self) -> None:
        for _ in range(1000):
            self.permits.release()


@pytest.fixture
def manager() -> Iterator[Manager]:
    fake = Manager()
    yield fake
    fake.finish()


@pytest.fixture
def jobs(manager: Manager) -> DownloadJobs:
    return DownloadJobs(manager)  # type: ignore[arg-type]  # a fake


def spec(name: str = "a/b", **fields: Any) -> ModelSpec:
    return ModelSpec(**{"alias": name, "name": name, "source": "huggingface", **fields})


def wait_for_end(jobs: DownloadJobs, job: DownloadRecord) -> DownloadRecord:
    wait_until(lambda: jobs.get(job.id).is_over)
    return jobs.get(job.id)


def test_job_reports_its_progress(jobs: DownloadJobs, manager: Manager) -> None:
    """It starts at once, reports phase, bytes and rate, and ends with the directory of the files."""
    manager.steps = ((0, 100), (40, 100))
    job = jobs.start(spec())
    assert job.state == "running"
    manager.permits.release()
    wait_until(lambda: jobs.get(job.id).done_bytes == 40)
    now = jobs.get(job.id)
    assert (now.phase, now.total_bytes, now.revision, now.path) == ("download", 100, None, None)
    wait_until(lambda: (jobs.get(job.id).bytes_per_s or 0) > 0)
    manager.finish()
    done = wait_for_end(jobs, job)
    assert (done.state, done.revision, done.path, done.error) == ("done", "c0ffee", str(SNAPSHOT.path), None)
    assert done.bytes_per_s is None


def test_two_jobs_run_and_others_wait(jobs: DownloadJobs, manager: Manager) -> None:
    """A third job starts when one of the first two ends. A job that waits is cancelled at once."""
    started = [jobs.start(spec(f"a/{i}")) for i in range(4)]
    assert [job.state for job in started] == ["running", "running", "queued", "queued"]
    assert [job.id for job in jobs.list()] == [job.id for job in reversed(started)]
    assert jobs.cancel(started[2].id).state == "cancelled"
    assert "a/3" not in manager.downloads
    manager.finish()
    assert [wait_for_end(jobs, job).state for job in started] == ["done", "done", "cancelled", "done"]
    assert sorted(manager.downloads) == ["a/0", "a/1", "a/3"]


def test_job_whose_thread_cannot_be_started_fails(jobs: DownloadJobs, manager: Manager) -> None:
    """It does not stay `running`, says what to do, and takes no turn from later jobs."""
    with no_more_threads():
        failed = [jobs.start(spec(f"a/{i}")) for i in range(4)]
    for job in failed:
        assert (job.state, job.error_code) == ("failed", "thread_limit")
        assert job.ended is not None
        assert "--pids-limit" in (job.error or "")
    manager.finish()
    again = [wait_for_end(jobs, jobs.start(spec(f"a/{i}"))) for i in range(4)]
    assert [job.state for job in again] == ["done"] * 4


def test_waiting_job_whose_thread_cannot_be_started_fails(jobs: DownloadJobs, manager: Manager) -> None:
    """It fails when its turn comes, although no client waits for it."""
    started = [jobs.start(spec(f"a/{i}")) for i in range(3)]
    wait_until(lambda: len(manager.downloads) == 2)
    with no_more_threads():
        manager.finish()
        assert [wait_for_end(jobs, job).state for job in started] == ["done", "done", "failed"]


def test_equal_requests_share_a_job(jobs: DownloadJobs, manager: Manager) -> None:
    """An alias makes no difference; another revision, `force` or compiling does. A job that is over is not shared."""
    first = jobs.start(spec(), force=True)
    assert jobs.start(spec()).id == first.id
    assert jobs.start(spec(alias="other")).id == first.id
    others = [
        jobs.start(spec(revision="v1")),
        jobs.start(spec(source="modelscope")),
        jobs.start(spec(), compiling=True),
        jobs.start(spec(precision="int8"), compiling=True),
    ]
    assert len({first.id, *(job.id for job in others)}) == 5
    plain = jobs.start(spec("a/c"))
    assert jobs.start(spec("a/c"), force=True).id != plain.id
    manager.finish()
    wait_for_end(jobs, first)
    assert jobs.start(spec(), force=True).id != first.id


def test_running_job_is_cancelled(jobs: DownloadJobs, manager: Manager) -> None:
    """It reports that it is being cancelled until it ends. An equal request starts another job."""
    job = jobs.start(spec())
    cancelling = jobs.cancel(job.id)
    assert (cancelling.state, cancelling.cancelling) == ("running", True)
    again = jobs.start(spec())
    assert again.id != job.id
    manager.finish()
    ended = wait_for_end(jobs, job)
    assert (ended.state, ended.cancelling, ended.error) == ("cancelled", False, None)
    assert wait_for_end(jobs, again).state == "done"
    assert jobs.cancel(job.id) == ended


def test_cancelled_job_that_hangs_does_not_block_others(jobs: DownloadJobs, manager: Manager) -> None:
    hanging = [jobs.start(spec(f"a/{i}")) for i in range(2)]
    waiting = jobs.start(spec("b/c", source="modelscope"))
    assert waiting.state == "queued"
    jobs.cancel(hanging[0].id)
    assert jobs.get(waiting.id).state == "running"
    assert [jobs.get(job.id).state for job in hanging] == ["running", "running"]
    manager.finish()
    assert [wait_for_end(jobs, job).state for job in (*hanging, waiting)] == ["cancelled", "done", "done"]


def test_compiling_is_a_phase_of_a_job_and_can_be_cancelled(jobs: DownloadJobs, manager: Manager) -> None:
    """A job that ends has the notes of the compiled model."""
    job = jobs.start(spec(), compiling=True)
    wait_until(lambda: jobs.get(job.id).phase == "compile")
    jobs.cancel(job.id)
    assert wait_for_end(jobs, job).state == "cancelled"
    assert manager.compiled == []
    job = jobs.start(spec(precision="int8"), compiling=True)
    manager.finish()
    done = wait_for_end(jobs, job)
    assert (done.state, done.precision, done.notes) == ("done", "int8", ["a note"])
    assert done.path == str(SNAPSHOT.path)


@pytest.mark.parametrize(
    ("failure", "message", "code"),
    [
        (
            HubUnavailableError("The hub is down: try again later."),
            "The hub is down: try again later.",
            "hub_unavailable",
        ),
        (RuntimeError("odd\nmore"), "RuntimeError: odd", "internal_error"),
        (PanicError("of a library"), "PanicError: of a library", "internal_error"),
    ],
    ids=["expected", "unexpected", "no exception"],
)
def test_failed_job_has_the_reason(
    jobs: DownloadJobs, manager: Manager, failure: BaseException, message: str, code: str
) -> None:
    """Failed jobs do not block later ones."""
    manager.failure = failure
    manager.finish()
    for _ in range(3):  # more than run at a time
        failed = wait_for_end(jobs, jobs.start(spec()))
    assert (failed.state, failed.error, failed.error_code) == ("failed", message, code)
    manager.failure = None
    assert wait_for_end(jobs, jobs.start(spec())).state == "done"


def test_number_of_jobs_is_limited(jobs: DownloadJobs, manager: Manager) -> None:
    """At most 100 jobs wait, and the last 100 that have ended are remembered."""
    started = [jobs.start(spec(f"a/{i}")) for i in range(102)]
    with pytest.raises(QueueFullError):
        jobs.start(spec("a/more"))
    assert jobs.start(spec("a/101")).id == started[101].id
    manager.finish()
    for job in started[2:]:
        wait_for_end(jobs, job)
    wait_until(lambda: all(job.is_over for job in jobs.list()))
    last = wait_for_end(jobs, jobs.start(spec("a/last")))
    assert len(jobs.list()) == 100
    assert jobs.list()[0] == last
    with pytest.raises(JobNotFoundError):
        jobs.get(started[0].id)


def test_stop_cancels_all_jobs(jobs: DownloadJobs, manager: Manager) -> None:
    """It does not wait for a transfer that hangs."""
    started = [jobs.start(spec(f"a/{i}")) for i in range(3)]
    wait_until(lambda: all(jobs.get(job.id).phase == "download" for job in started[:2]))
    jobs.stop(within_s=0.01)
    assert jobs.get(started[2].id).state == "cancelled"
    assert all(jobs.get(job.id).cancelling for job in started[:2])
    manager.finish()
    assert [wait_for_end(jobs, job).state for job in started] == ["cancelled"] * 3
    assert "a/2" not in manager.downloads
