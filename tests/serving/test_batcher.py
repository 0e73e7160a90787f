"""The batcher, driven without a model and without real time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emb_model_provider.serving.batcher import Batch, Batcher, BatchJob, BatchPolicy


def policy(**changes: object) -> BatchPolicy:
    return BatchPolicy(**{"max_batch_size": 8, "max_batch_tokens": 1000, **changes})  # type: ignore[arg-type]


def job(*lengths: int, at: float = 0.0) -> BatchJob:
    return BatchJob([[1] * length for length in lengths], arrived_at=at)


def take(batcher: Batcher[BatchJob], now: float = 0.0) -> Batch[BatchJob]:
    batch = batcher.next_batch(now)
    assert isinstance(batch, Batch)
    return batch


def drain(batcher: Batcher[BatchJob]) -> list[Batch[BatchJob]]:
    batches = []
    while isinstance(batch := batcher.next_batch(float("inf")), Batch):
        batches.append(batch)
    return batches


def test_inputs_of_different_requests_share_a_batch() -> None:
    """Requests that wait together run together."""
    batcher: Batcher[BatchJob] = Batcher(policy())
    jobs = [job(5), job(5), job(5, 5)]
    for each in jobs:
        batcher.submit(each)
    batch = take(batcher)
    assert {id(member) for member, _ in batch.members} == set(map(id, jobs))
    assert len(batch.members) == 4
    assert batcher.next_batch(0.0) is None


def test_without_dynamic_batching_requests_never_share_a_batch() -> None:
    """The off switch keeps each request's inputs to themselves, and still batches within a request."""
    batcher: Batcher[BatchJob] = Batcher(policy(dynamic=False))
    for each in (job(5, 5, 5), job(5), job(5, 5)):
        batcher.submit(each)
    batches = drain(batcher)
    assert all(len({id(member) for member, _ in batch.members}) == 1 for batch in batches)
    assert sorted(len(batch.members) for batch in batches) == [1, 2, 3]


def test_a_batch_keeps_to_its_size_and_its_padded_tokens() -> None:
    """Neither limit is exceeded, padding counted."""
    batcher: Batcher[BatchJob] = Batcher(policy(max_batch_size=8, max_batch_tokens=100))
    batcher.submit(job(*[30] * 20))
    sizes = [len(batch.members) for batch in drain(batcher)]
    assert sizes == [3] * 6 + [2]
    batcher.submit(job(*[2] * 20))
    assert [len(batch.members) for batch in drain(batcher)] == [8, 8, 4]


def test_an_input_larger_than_the_token_budget_runs_alone() -> None:
    """An input over the budget is still served."""
    batcher: Batcher[BatchJob] = Batcher(policy(max_batch_tokens=100))
    batcher.submit(job(500, 10, 10))
    assert sorted(batch.longest for batch in drain(batcher)) == [10, 500]


def test_neighbours_in_length_run_together() -> None:
    """Short and long inputs do not pad each other."""
    batcher: Batcher[BatchJob] = Batcher(policy(max_batch_tokens=10_000))
    batcher.submit(job(*[10, 400] * 8))
    for batch in drain(batcher):
        assert batch.padded_tokens == batch.tokens


def test_a_small_batch_may_be_mostly_padding() -> None:
    """Two short inputs of different length are cheaper together than one after the other."""
    batcher: Batcher[BatchJob] = Batcher(policy(free_padded_tokens=256))
    batcher.submit(job(3))
    batcher.submit(job(60))
    assert len(take(batcher).members) == 2


def test_a_small_request_passes_between_the_batches_of_a_large_one() -> None:
    """A request of one text waits for one batch at most, not for the whole large request."""
    batcher: Batcher[BatchJob] = Batcher(policy())
    large, small = job(*[20] * 2048), job(20)
    batcher.submit(large)
    take(batcher)
    batcher.submit(small)
    assert small in {member for member, _ in take(batcher).members}


def test_a_small_request_of_another_length_passes_too() -> None:
    """A short text gets its turn though it cannot share a batch with the large request's documents."""
    batcher: Batcher[BatchJob] = Batcher(policy(max_batch_tokens=100_000))
    large, small = job(*[500] * 2048), job(5)
    batcher.submit(large)
    take(batcher)
    batcher.submit(small)
    turns = [take(batcher) for _ in range(2)]
    assert any(small in {member for member, _ in turn.members} for turn in turns)


def test_two_large_requests_are_served_side_by_side() -> None:
    """Neither of two large requests waits for the other's end."""
    batcher: Batcher[BatchJob] = Batcher(policy())
    first, second = job(*[20] * 400), job(*[20] * 400)
    batcher.submit(first)
    batcher.submit(second)
    for _ in range(20):
        take(batcher)
    assert abs(first.waiting - second.waiting) <= 16


def test_a_large_request_is_not_starved_by_a_stream_of_small_ones() -> None:
    """Newcomers cannot pass a request forever: it gets its share under steady overload."""
    batcher: Batcher[BatchJob] = Batcher(policy(max_batch_tokens=1_000))
    large = job(*[500] * 20)
    batcher.submit(large)
    small_turns = 0
    for _ in range(20_000):
        for _ in range(8):
            batcher.submit(job(5))
        small_turns += all(member is not large for member, _ in take(batcher).members)
        if not large.waiting:
            break
    assert not large.waiting, "the large request was passed over for 20,000 batches"
    assert small_turns > 20, "the small ones had their turns too"


def test_what_waits_is_dealt_out_among_idle_lanes() -> None:
    """Two idle lanes get half each, instead of one getting all while the other looks on."""
    batcher: Batcher[BatchJob] = Batcher(policy(max_batch_size=64))
    for _ in range(10):
        batcher.submit(job(5))
    first = batcher.next_batch(0.0, idle_streams=2)
    assert isinstance(first, Batch)
    assert len(first.members) == 5
    assert len(take(batcher).members) == 5


def test_nobody_waits_with_the_default_minimum() -> None:
    """A single input runs at once when MIN_BATCH_SIZE is 1."""
    batcher: Batcher[BatchJob] = Batcher(policy(min_batch_size=1, max_wait_s=10))
    batcher.submit(job(5, at=100.0))
    assert isinstance(batcher.next_batch(100.0), Batch)


def test_fewer_inputs_than_the_minimum_wait_until_the_oldest_has_waited_enough() -> None:
    """With fewer than MIN waiting, the batch starts MAX_WAIT after the oldest arrived."""
    batcher: Batcher[BatchJob] = Batcher(policy(min_batch_size=4, max_wait_s=0.05))
    batcher.submit(job(5, at=100.0))
    batcher.submit(job(5, at=100.03))
    assert batcher.next_batch(100.04) == pytest.approx(100.05)
    assert len(take(batcher, 100.05).members) == 2


def test_the_wait_ends_when_the_minimum_is_there() -> None:
    """MIN inputs start a batch at once, whichever requests they belong to."""
    batcher: Batcher[BatchJob] = Batcher(policy(min_batch_size=4, max_wait_s=10))
    batcher.submit(job(5, 5, 5, at=100.0))
    assert batcher.next_batch(100.0) == pytest.approx(110.0)
    batcher.submit(job(5, at=101.0))
    assert len(take(batcher, 101.0).members) == 4


def test_a_cancelled_request_leaves_the_queue() -> None:
    """What was cancelled counts no more and never runs; the others do."""
    batcher: Batcher[BatchJob] = Batcher(policy())
    gone, stays = job(*[10] * 100), job(7, 7)
    batcher.submit(gone)
    batcher.submit(stays)
    batcher.cancel(gone)
    assert (batcher.waiting_inputs, batcher.waiting_tokens) == (2, 14)
    assert {member for batch in drain(batcher) for member, _ in batch.members} == {stays}


def test_a_request_that_is_half_done_can_be_cancelled() -> None:
    """Cancelling twice, or after the first batch, keeps the counts right."""
    batcher: Batcher[BatchJob] = Batcher(policy())
    half = job(*[10] * 20)
    batcher.submit(half)
    take(batcher)
    batcher.cancel(half)
    batcher.cancel(half)
    assert (batcher.waiting_inputs, batcher.waiting_tokens) == (0, 0)
    assert batcher.next_batch(0.0) is None


def test_an_empty_job_is_refused() -> None:
    """A job without inputs would never be done."""
    with pytest.raises(ValueError, match="at least one"):
        BatchJob([])


@given(
    requests=st.lists(st.lists(st.integers(1, 600), min_size=1, max_size=40), min_size=1, max_size=12),
    cancelled=st.sets(st.integers(0, 11)),
    batch_size=st.integers(1, 16),
    batch_tokens=st.integers(1, 2_000),
    dynamic=st.booleans(),
    between=st.integers(0, 3),
)
def test_every_input_runs_exactly_once(
    requests: list[list[int]],
    cancelled: set[int],
    batch_size: int,
    batch_tokens: int,
    dynamic: bool,
    between: int,
) -> None:
    """Whatever arrives, is cancelled and runs in between: each input runs once, within the limits, and counts agree."""
    batcher: Batcher[BatchJob] = Batcher(
        policy(max_batch_size=batch_size, max_batch_tokens=batch_tokens, dynamic=dynamic)
    )
    jobs, batches = [job(*lengths) for lengths in requests], []
    for index, each in enumerate(jobs):
        batcher.submit(each)
        for _ in range(between):
            if isinstance(batch := batcher.next_batch(0.0), Batch):
                batches.append(batch)
        if index in cancelled:
            batcher.cancel(each)
    batches += drain(batcher)

    ran = [(id(member), row) for batch in batches for member, row in batch.members]
    assert len(ran) == len(set(ran))
    for each in jobs:
        if not each.cancelled:
            assert {row for identity, row in ran if identity == id(each)} == set(range(len(each.ids)))
    for batch in batches:
        lengths = [len(member.ids[row]) for member, row in batch.members]
        assert len(lengths) <= batch_size
        assert len(lengths) == 1 or batch.padded_tokens <= batch_tokens
        assert (batch.tokens, batch.longest) == (sum(lengths), max(lengths))
    assert (batcher.waiting_inputs, batcher.waiting_tokens) == (0, 0)


# --- jobs that share no batch --------------------------------------------------------------------------


def test_a_job_that_is_alone_shares_no_batch_and_has_every_other_one() -> None:
    """It is through soon, however many wait, and they do not wait for all of it."""
    batcher: Batcher[BatchJob] = Batcher(policy())
    mark_suspect = job(*[5] * 24)
    mark_suspect.exclusive = True
    others = [job(5) for _ in range(40)]
    for each in (*others, mark_suspect):
        batcher.submit(each)
    batches = drain(batcher)
    owners = [{id(member) for member, _ in batch.members} for batch in batches]
    assert [owner == {id(mark_suspect)} for owner in owners[:6]] == [True, False] * 3
    assert not any(id(mark_suspect) in owner for owner in owners[6:])
    assert sum(len(batch.members) for batch in batches) == 64
    assert (batcher.waiting_inputs, batcher.waiting_tokens) == (0, 0)


def test_jobs_that_are_alone_can_be_all_there_is_or_be_cancelled() -> None:
    """Whatever is left, in whatever order it goes, each of its inputs runs once."""
    batcher: Batcher[BatchJob] = Batcher(policy())
    first, second, third, normal = job(5, 5), job(5), job(5, 5), job(5)
    for each in (first, second, third):
        each.exclusive = True
    for each in (first, normal, second, third):
        batcher.submit(each)
    batcher.cancel(first)
    batcher.cancel(normal)
    batches = drain(batcher)
    assert [{id(member) for member, _ in batch.members} for batch in batches] == [{id(second)}, {id(third)}]
    assert sum(len(batch.members) for batch in batches) == 3
    assert batcher.next_batch(0.0) is None
