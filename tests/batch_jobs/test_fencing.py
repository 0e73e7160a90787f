"""A worker whose lease was taken over changes nothing, and no lease blocks the work of a process that has ended."""

from __future__ import annotations

import asyncio
import os
import time
from typing import TYPE_CHECKING

import pytest

from benchmarks.batch_worker import HashCalculator
from emb_model_provider.batch_jobs.lines import validate_file
from emb_model_provider.batch_jobs.segments import SegmentStore
from emb_model_provider.batch_jobs.types import Limits
from emb_model_provider.batch_jobs.work import BatchLease, ChunkLease, Ending, Results, WorkStore
from tests.batch_jobs.helpers import FAST, ids, lines, reach, working

if TYPE_CHECKING:
    from emb_model_provider.batch_jobs.batches import Batch
    from emb_model_provider.batch_jobs.segments import Segment
    from tests.batch_jobs.helpers import Jobs


class Worker:
    """The steps of a worker, one by one."""

    def __init__(self, jobs: Jobs, name: str, instance: str = "1", *, lease_s: float = 60) -> None:
        self.jobs = jobs
        self.work = WorkStore(jobs.batches, name, instance, lease_s)
        self.segments = SegmentStore(jobs.directory)

    def claim_batch(self) -> BatchLease:
        lease = self.work.claim()
        assert isinstance(lease, BatchLease)
        return lease

    def claim_chunk(self) -> ChunkLease:
        lease = self.work.claim()
        assert isinstance(lease, ChunkLease)
        return lease

    def validate(self) -> bool:
        lease = self.claim_batch()
        path = self.jobs.files.path(lease.batch.input_file_id)
        check = HashCalculator().check
        result = validate_file(path, lease.batch, lease.input_sha256, check, Limits(), FAST, lambda: None)
        return self.work.validated(lease, result)

    def write(self, lease: ChunkLease, content: bytes = b"{}\n") -> Segment:
        return self.segments.write(lease.batch_id, lease.seq, lease.fence, [content], [])

    def done(self, lease: ChunkLease, segment: Segment | None = None) -> bool:
        return self.work.done(lease, Results(segment or self.write(lease), lease.chunk.lines, 0, 7))

    def keep(self, lease: ChunkLease) -> bool:
        return self.work.keep(lease, Results(self.write(lease), 1, 0, 3))

    def finish(self, lease: BatchLease, content: bytes = b"{}\n") -> bool:
        with self.jobs.files.output("", "output", 3600) as output:
            output.write(content)
            return self.work.finalized(lease, self.jobs.files.record, Ending(output.store(time.time()), None))


@pytest.fixture
def batch(jobs: Jobs) -> Batch:
    """Return a batch with two chunks."""
    batch = jobs.create(lines(16))
    assert Worker(jobs, "first").validate()
    return batch


def test_each_chunk_is_leased_once(jobs: Jobs, batch: Batch) -> None:
    a, b = Worker(jobs, "a"), Worker(jobs, "b")
    leases = [a.claim_chunk(), b.claim_chunk()]
    assert [(lease.seq, lease.fence, lease.chunk.first_line) for lease in leases] == [(0, 1, 1), (1, 1, 9)]
    assert a.work.claim() is None
    assert b.work.claim() is None


def test_a_lease_that_was_taken_over(jobs: Jobs, batch: Batch) -> None:
    """Neither before nor after the other worker is done."""
    slow, other = Worker(jobs, "slow"), Worker(jobs, "other")
    old = slow.claim_chunk()
    segment = slow.write(old)
    jobs.later_s = 61
    new = other.claim_chunk()
    assert (new.seq, new.fence) == (old.seq, old.fence + 1)
    assert not slow.done(old, segment)
    assert slow.work.renew([old]) == [old]
    slow.work.release(old)
    assert other.work.renew([new]) == []
    own = other.write(new)
    assert other.done(new, own)
    assert not slow.done(old, segment)
    assert jobs.batches.get("", batch.id).completed == 8
    assert own.name != segment.name


def test_a_lease_that_ended_but_was_not_taken_over(jobs: Jobs, batch: Batch) -> None:
    slow = Worker(jobs, "slow")
    lease = slow.claim_chunk()
    jobs.later_s = 61
    assert slow.done(lease)


def test_renewed_leases(jobs: Jobs, batch: Batch) -> None:
    a = Worker(jobs, "a")
    leases = [a.claim_chunk(), a.claim_chunk()]
    for jobs.later_s in (50, 100):
        assert a.work.renew(leases) == []
        assert Worker(jobs, "b").work.claim() is None


def test_a_released_lease(jobs: Jobs, batch: Batch) -> None:
    a = Worker(jobs, "a")
    lease = a.claim_chunk()
    a.work.release(lease)
    assert a.work.renew([lease]) == [lease]
    assert not a.done(lease)
    assert jobs.batches.get("", batch.id).completed == 0
    assert Worker(jobs, "b").claim_chunk().seq == lease.seq


def test_a_result_is_recorded_once(jobs: Jobs, batch: Batch) -> None:
    """If the connection was lost during the commit, it is not known whether it was recorded."""
    a = Worker(jobs, "a")
    lease = a.claim_chunk()
    segment = a.write(lease)
    assert a.done(lease, segment)
    assert a.done(lease, segment)
    current = jobs.batches.get("", batch.id)
    assert (current.completed, current.tokens) == (8, 7)


def test_a_process_that_is_started_again_takes_over_its_leases(jobs: Jobs, batch: Batch) -> None:
    dead = Worker(jobs, "a", "1")
    leases = [dead.claim_chunk(), dead.claim_chunk()]
    assert Worker(jobs, "b").work.claim() is None
    again = Worker(jobs, "a", "2")
    assert [again.claim_chunk().seq for _ in leases] == [0, 1]
    assert not dead.done(leases[0])
    assert again.work.claim() is None


def test_names_that_look_like_patterns(jobs: Jobs, batch: Batch) -> None:
    Worker(jobs, "abc").claim_chunk()
    Worker(jobs, "abc").claim_chunk()
    assert Worker(jobs, "a%", "2").work.claim() is None
    assert Worker(jobs, "ab_", "2").work.claim() is None
    assert Worker(jobs, "ab", "2").work.claim() is None


@pytest.mark.parametrize("state", ["cancelling", "finalizing"], ids=["cancelled", "expired"])
def test_work_of_a_batch_that_is_ended(jobs: Jobs, batch: Batch, state: str) -> None:
    a = Worker(jobs, "a", lease_s=48 * 3600)
    lease = a.claim_chunk()
    if state == "cancelling":
        jobs.batches.cancel("", batch.id)
    else:
        jobs.later_s = 24 * 3600
        a.work.expire()
    assert jobs.batches.get("", batch.id).state == state
    assert a.work.renew([lease]) == [lease]
    assert a.work.has_ended(lease)
    assert not a.done(lease)
    assert a.work.claim() is None
    assert a.keep(lease)
    assert a.keep(lease)
    assert not a.work.has_ended(lease)
    ending = a.claim_batch()
    assert [result.results is not None for result in a.work.results(ending)] == [True, False]
    assert a.finish(ending)
    assert not a.done(lease)


def test_results_that_come_after_the_files_are_begun(jobs: Jobs, batch: Batch) -> None:
    """A worker that was stopped for longer than its lease adds nothing, because its lines are in the error file."""
    slow, other = Worker(jobs, "slow"), Worker(jobs, "other")
    leases = [slow.claim_chunk(), slow.claim_chunk()]
    jobs.batches.cancel("", batch.id)
    assert other.work.claim() is None
    jobs.later_s = 61
    ending = other.claim_batch()
    for lease in leases:
        assert not slow.work.has_ended(lease)
        assert not slow.keep(lease)
        assert not slow.done(lease)
    assert other.finish(ending)
    assert jobs.batches.get("", batch.id).completed == 0


def test_a_cancelled_batch_of_a_process_that_is_started_again(jobs: Jobs, batch: Batch) -> None:
    dead = Worker(jobs, "a", "1")
    lease = dead.claim_chunk()
    jobs.batches.cancel("", batch.id)
    assert Worker(jobs, "b").work.claim() is None
    assert isinstance(Worker(jobs, "a", "2").work.claim(), BatchLease)
    assert not dead.keep(lease)


def test_a_batch_that_has_ended_does_not_pause(jobs: Jobs, batch: Batch) -> None:
    """A worker that was stopped may find out late that the database does not respond to it."""
    a = Worker(jobs, "a")
    assert a.done(a.claim_chunk())
    assert a.done(a.claim_chunk())
    assert a.finish(a.claim_batch())
    a.work.pause(batch.id, "The disk is full.")
    assert jobs.batches.get("", batch.id).pause_reason is None


def test_a_part_of_a_chunk(jobs: Jobs, batch: Batch) -> None:
    """The next lease begins with it, after the wait. It counts when the chunk is done."""
    a, b = Worker(jobs, "a"), Worker(jobs, "b")
    lease, _ = a.claim_chunk(), a.claim_chunk()
    results = Results(a.write(lease), 1, 0, 3)
    assert a.work.keep(lease, results, 30)
    assert b.work.claim() is None
    jobs.later_s = 31
    again = b.claim_chunk()
    assert (again.seq, again.fence, again.kept, again.crashes) == (0, 2, results, 0)
    assert a.work.keep(lease, results)  # if the first success was unknown
    assert jobs.batches.get("", batch.id).completed == 0
    assert b.done(again)
    assert jobs.batches.get("", batch.id).completed == 8


def test_validation_by_two_workers(jobs: Jobs) -> None:
    batch = jobs.create(lines(16))
    a, b = Worker(jobs, "a"), Worker(jobs, "b")
    old = a.claim_batch()
    jobs.later_s = 61
    assert b.validate()
    path = jobs.files.path(batch.input_file_id)
    result = validate_file(path, batch, old.input_sha256, HashCalculator().check, Limits(), FAST, lambda: None)
    assert not a.work.validated(old, result)
    assert jobs.batches.get("", batch.id).total == 16


def test_finalizing_by_two_workers(jobs: Jobs, batch: Batch) -> None:
    """The files of one of them are those of the batch."""
    a, b = Worker(jobs, "a"), Worker(jobs, "b")
    assert a.done(a.claim_chunk())
    assert a.done(a.claim_chunk())
    old = a.claim_batch()
    assert b.work.claim() is None
    jobs.later_s = 61
    new = b.claim_batch()
    assert not a.finish(old)
    assert b.finish(new)
    assert not a.finish(old)
    assert a.work.renew([old]) == [old]
    current = jobs.batches.get("", batch.id)
    assert (current.state, len(jobs.files.list("", purpose="batch_output").items)) == ("completed", 1)


def test_cancel_while_finalizing(jobs: Jobs, batch: Batch) -> None:
    a = Worker(jobs, "a")
    assert a.done(a.claim_chunk())
    assert a.done(a.claim_chunk())
    old = a.claim_batch()
    jobs.batches.cancel("", batch.id)
    assert not a.finish(old)
    assert a.finish(a.claim_batch())
    assert jobs.batches.get("", batch.id).state == "cancelled"


@pytest.mark.parametrize("damage", ["removed", "truncated", "changed"])
async def test_a_segment_that_was_damaged_on_disk(jobs: Jobs, damage: str) -> None:
    """Its chunk is computed again."""
    batch = jobs.create(lines(64))
    calculator = HashCalculator(line_s=0.005)
    async with working(jobs, calculator):
        await reach(jobs, batch, lambda current: current.completed)
        (path, *_) = sorted((jobs.directory / "segments" / batch.id).iterdir())
        match damage:
            case "removed":
                path.unlink()
            case "truncated":
                os.truncate(path, 100)
            case "changed":
                path.write_bytes(path.read_bytes().replace(b"line-1", b"line-9"))
        batch = await reach(jobs, batch, "completed")
    assert ids(jobs, batch.output_file_id) == [f"line-{number}" for number in range(64)]
    assert (batch.completed, calculator.computed.total()) == (64, 72)
    assert batch.tokens == sum(len(f'"text of line-{number}"') for number in range(64))


async def test_segments_of_interrupted_work_are_removed(jobs: Jobs) -> None:
    batch = jobs.create(lines(64))
    directory = jobs.directory / "segments"
    for name in ("batch_gone", batch.id):
        (directory / name).mkdir(parents=True)
        (directory / name / "000000.9.jsonl").write_bytes(b"part of a segm")
    async with working(jobs, HashCalculator()):
        batch = await reach(jobs, batch, "completed")
        while list(directory.iterdir()):
            await asyncio.sleep(0.02)
    assert batch.completed == 64
