"""Downloads as jobs: which run, which are one, how they end. The manager is a fake; tests/api has the real one."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.errors import HubUnavailableError, JobNotFoundError, QueueFullError
from emb_model_provider.progress import Progress
from emb_model_provider.management.downloads import DownloadJobs
from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.snapshots.snapshot import Snapshot
from tests.service import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from emb_model_provider.management.downloads import Job

SNAPSHOT = Snapshot.of("huggingface", "a/b", "c0ffee", Path("/models/a/b"), ())


@dataclass
class Compiled:
    snapshot: Snapshot = SNAPSHOT
    notes: tuple[str, ...] = ("a note",)


class PanicError(BaseException):
    """As what libraries written in Rust raise where they panic: no Exception."""


@dataclass
class Manager:
    """Fetches when it is let, and not before; says how far it is as often as it is let."""

    go_on: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    began: list[str] = field(default_factory=list)
    compiled: list[str] = field(default_factory=list)
    failure: BaseException | None = None
    steps: tuple[tuple[int, int], ...] = ((0, 100), (100, 100))

    def ensure(self, spec: ModelSpec, *, force: bool, on_progress: Callable[[Progress], None]) -> Snapshot:
        self.began.append(spec.name)
        for done, total in self.steps:
            on_progress(Progress("download", spec.name, done, total))
            self.go_on.acquire()
        on_progress(Progress("verify", spec.name, 100, 100))
        if self.failure is not None:
            raise self.failure
        return SNAPSHOT

    def compile(
        self,
        spec: ModelSpec,
        *,
        on_progress: Callable[[Progress], None],
        on_compiling: Callable[[], None],
        stopped: Callable[[], bool],
    ) -> Compiled:
        on_compiling()
        while not self.go_on.acquire(timeout=0.01):
            if stopped():
                raise InterruptedError("stopped")
        self.compiled.append(spec.name)
        return Compiled()

    def finish(self) -> None:
        for _ in range(1000):
            self.go_on.release()


@pytest.fixture
def manager() -> Iterator[Manager]:
    fake = Manager()
    yield fake
    fake.finish()


@pytest.fixture
def jobs(manager: Manager) -> DownloadJobs:
    return DownloadJobs(manager)  # type: ignore[arg-type]  # as much of one as jobs use


def spec(name: str = "a/b", **fields: Any) -> ModelSpec:
    return ModelSpec(**{"alias": name, "name": name, "source": "huggingface", **fields})


def over(jobs: DownloadJobs, job: Job) -> Job:
    wait_until(lambda: jobs.get(job.id).is_over)
    return jobs.get(job.id)


def test_job_tells_how_far_it_is(jobs: DownloadJobs, manager: Manager) -> None:
    """It begins at once, tells phase, bytes and speed, and ends with where the files are."""
    manager.steps = ((0, 100), (40, 100))
    job = jobs.start(spec())
    assert job.state == "running"
    manager.go_on.release()
    wait_until(lambda: jobs.get(job.id).done_bytes == 40)
    now = jobs.get(job.id)
    assert (now.phase, now.total_bytes, now.revision, now.path) == ("download", 100, None, None)
    assert now.bytes_per_s is not None
    assert now.bytes_per_s > 0
    manager.finish()
    done = over(jobs, job)
    assert (done.state, done.revision, done.path, done.error) == ("done", "c0ffee", SNAPSHOT.path, None)
    assert done.bytes_per_s is None


def test_two_run_and_others_wait_their_turn(jobs: DownloadJobs, manager: Manager) -> None:
    """The third waits, and begins when one of the first two ends; a job that waits can be cancelled at once."""
    started = [jobs.start(spec(f"a/{i}")) for i in range(4)]
    assert [job.state for job in started] == ["running", "running", "queued", "queued"]
    assert [job.id for job in jobs.list()] == [job.id for job in reversed(started)]
    assert jobs.cancel(started[2].id).state == "cancelled"
    assert "a/3" not in manager.began
    manager.finish()
    assert [over(jobs, job).state for job in started] == ["done", "done", "cancelled", "done"]
    assert sorted(manager.began) == ["a/0", "a/1", "a/3"]


def test_same_wish_is_the_same_job(jobs: DownloadJobs, manager: Manager) -> None:
    """An alias makes no difference; another revision, `force` or compiling does. What is over is not joined."""
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
    over(jobs, first)
    assert jobs.start(spec(), force=True).id != first.id


def test_cancelled_job_ends_when_it_can(jobs: DownloadJobs, manager: Manager) -> None:
    """A running one says that it is about to end, and ends at its next byte; the same wish is another job then."""
    job = jobs.start(spec())
    cancelling = jobs.cancel(job.id)
    assert (cancelling.state, cancelling.cancelling) == ("running", True)
    again = jobs.start(spec())
    assert again.id != job.id
    manager.finish()
    ended = over(jobs, job)
    assert (ended.state, ended.cancelling, ended.error) == ("cancelled", False, None)
    assert over(jobs, again).state == "done"
    assert jobs.cancel(job.id) == ended


def test_cancelled_job_that_hangs_keeps_nobody_waiting(jobs: DownloadJobs, manager: Manager) -> None:
    """A hub that is silent holds up what is fetched from it, and no more: its cancelled jobs give their places away."""
    hanging = [jobs.start(spec(f"a/{i}")) for i in range(2)]
    waiting = jobs.start(spec("b/c", source="modelscope"))
    assert waiting.state == "queued"
    jobs.cancel(hanging[0].id)
    assert jobs.get(waiting.id).state == "running"
    assert [jobs.get(job.id).state for job in hanging] == ["running", "running"]
    manager.finish()
    assert [over(jobs, job).state for job in (*hanging, waiting)] == ["cancelled", "done", "done"]


def test_compiling_comes_after_fetching_and_can_be_cancelled(jobs: DownloadJobs, manager: Manager) -> None:
    """The phase says so, what compiling has to say is kept, and a cancel ends it."""
    job = jobs.start(spec(), compiling=True)
    wait_until(lambda: jobs.get(job.id).phase == "compile")
    jobs.cancel(job.id)
    assert over(jobs, job).state == "cancelled"
    assert manager.compiled == []
    job = jobs.start(spec(precision="int8"), compiling=True)
    manager.finish()
    done = over(jobs, job)
    assert (done.state, done.precision, done.notes) == ("done", "int8", ("a note",))
    assert done.path == SNAPSHOT.path


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (HubUnavailableError("The hub is away: ask later."), "The hub is away: ask later."),
        (RuntimeError("odd\nmore"), "RuntimeError: odd"),
        (PanicError("of a library in Rust"), "PanicError: of a library in Rust"),
    ],
    ids=["expected", "unexpected", "no exception"],
)
def test_failed_job_keeps_the_reason(
    jobs: DownloadJobs, manager: Manager, failure: BaseException, words: str
) -> None:
    """What went wrong is told, whatever it was, and later jobs are not held up by it."""
    manager.failure = failure
    manager.finish()
    for _ in range(3):  # more than run at a time
        failed = over(jobs, jobs.start(spec()))
    assert (failed.state, failed.error, failed.failure) == ("failed", words, failure)
    manager.failure = None
    assert over(jobs, jobs.start(spec())).state == "done"


def test_what_is_kept_is_bounded(jobs: DownloadJobs, manager: Manager) -> None:
    """Of jobs that ended the last hundred are remembered; and no more than a hundred may wait."""
    started = [jobs.start(spec(f"a/{i}")) for i in range(102)]
    with pytest.raises(QueueFullError):
        jobs.start(spec("a/more"))
    assert jobs.start(spec("a/101")).id == started[101].id
    manager.finish()
    for job in started[2:]:
        over(jobs, job)
    wait_until(lambda: all(job.is_over for job in jobs.list()))
    last = over(jobs, jobs.start(spec("a/last")))
    assert len(jobs.list()) == 100
    assert jobs.list()[0] == last
    with pytest.raises(JobNotFoundError):
        jobs.get(started[0].id)


def test_stop_ends_what_can_end_and_waits_for_nothing_else(jobs: DownloadJobs, manager: Manager) -> None:
    """Jobs that wait are cancelled, those that run are asked to end, and a transfer that hangs is left behind."""
    started = [jobs.start(spec(f"a/{i}")) for i in range(3)]
    wait_until(lambda: all(jobs.get(job.id).phase == "download" for job in started[:2]))
    jobs.stop(within_s=0.01)
    assert jobs.get(started[2].id).state == "cancelled"
    assert all(jobs.get(job.id).cancelling for job in started[:2])
    manager.finish()
    assert [over(jobs, job).state for job in started] == ["cancelled"] * 3
    assert "a/2" not in manager.began
