"""The choice of batches, without a model and without a clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emb_model_provider.serving.batcher import BACKGROUND_SHARE, Batch, Batcher, BatchJob, BatchPolicy, PriorityBatcher


def policy(**changes: object) -> BatchPolicy:
    return BatchPolicy(**{"max_batch_size": 8, "max_batch_tokens": 1000, **changes})  # type: ignore[arg-type]


def job(*lengths: int, at: float = 0.0) -> BatchJob:
    return BatchJob([[1] * length for length in lengths], arrived_at=at)


def background(*lengths: int) -> BatchJob:
    return BatchJob([[1] * length for length in lengths], background=True)


def take(batcher: Batcher[BatchJob] | PriorityBatcher[BatchJob], now: float = 0.0) -> Batch[BatchJob]:
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
    for request in jobs:
        batcher.submit(request)
    batch = take(batcher)
    assert {id(member) for member, _ in batch.members} == set(map(id, jobs))
    assert len(batch.members) == 4
    assert batcher.next_batch(0.0) is None


def test_without_dynamic_batching_requests_never_share_a_batch() -> None:
    """Without dynamic batching a batch has inputs of one request only."""
    batcher: Batcher[BatchJob] = Batcher(policy(dynamic=False))
    for request in (job(5, 5, 5), job(5), job(5, 5)):
        batcher.submit(request)
    batches = drain(batcher)
    assert all(len({id(member) for member, _ in batch.members}) == 1 for batch in batches)
    assert sorted(len(batch.members) for batch in batches) == [1, 2, 3]


def test_batches_respect_size_and_padded_tokens() -> None:
    """No batch exceeds either limit. Padding counts."""
    batcher: Batcher[BatchJob] = Batcher(policy(max_batch_size=8, max_batch_tokens=100))
    batcher.submit(job(*[30] * 20))
    sizes = [len(batch.members) for batch in drain(batcher)]
    assert sizes == [3] * 6 + [2]
    batcher.submit(job(*[2] * 20))
    assert [len(batch.members) for batch in drain(batcher)] == [8, 8, 4]


def test_input_larger_than_the_token_budget_runs_alone() -> None:
    """An input that exceeds the budget is served nevertheless."""
    batcher: Batcher[BatchJob] = Batcher(policy(max_batch_tokens=100))
    batcher.submit(job(500, 10, 10))
    assert sorted(batch.longest for batch in drain(batcher)) == [10, 500]


def test_inputs_of_similar_length_run_together() -> None:
    """Short and long inputs are not padded to each other's length."""
    batcher: Batcher[BatchJob] = Batcher(policy(max_batch_tokens=10_000))
    batcher.submit(job(*[10, 400] * 8))
    batches = drain(batcher)
    assert [len(batch.members) for batch in batches] == [8, 8]
    assert all(batch.padded_tokens == batch.tokens for batch in batches)


def test_small_batch_can_be_mostly_padding() -> None:
    """Two short inputs of different length are faster in one batch than in two."""
    batcher: Batcher[BatchJob] = Batcher(policy(free_padded_tokens=256))
    batcher.submit(job(3))
    batcher.submit(job(60))
    assert len(take(batcher).members) == 2


def test_small_request_runs_between_the_batches_of_a_large_one() -> None:
    """A request of one text waits for one batch at most."""
    batcher: Batcher[BatchJob] = Batcher(policy())
    large, small = job(*[20] * 2048), job(20)
    batcher.submit(large)
    take(batcher)
    batcher.submit(small)
    assert small in {member for member, _ in take(batcher).members}


def test_small_request_of_another_length_is_not_delayed() -> None:
    """A short text runs soon, even if it cannot share a batch with the texts of the large request."""
    batcher: Batcher[BatchJob] = Batcher(policy(max_batch_tokens=100_000))
    large, small = job(*[500] * 2048), job(5)
    batcher.submit(large)
    take(batcher)
    batcher.submit(small)
    turns = [take(batcher) for _ in range(2)]
    assert any(small in {member for member, _ in turn.members} for turn in turns)


def test_two_large_requests_progress_equally() -> None:
    """Neither of two large requests waits for the end of the other."""
    batcher: Batcher[BatchJob] = Batcher(policy())
    first, second = job(*[20] * 400), job(*[20] * 400)
    batcher.submit(first)
    batcher.submit(second)
    for _ in range(20):
        take(batcher)
    assert abs(first.waiting - second.waiting) <= 16


def test_large_request_is_not_starved_by_small_ones() -> None:
    """Under constant overload by newer requests it still gets its share."""
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
    assert not large.waiting, "the large request got no share of 20,000 batches"
    assert small_turns > 20, "the small requests ran too"


def test_waiting_inputs_are_divided_among_idle_streams() -> None:
    """Each of two idle streams gets half of the inputs."""
    batcher: Batcher[BatchJob] = Batcher(policy(max_batch_size=64))
    for _ in range(10):
        batcher.submit(job(5))
    first = batcher.next_batch(0.0, idle_streams=2)
    assert isinstance(first, Batch)
    assert len(first.members) == 5
    assert len(take(batcher).members) == 5


def test_single_input_runs_at_once_by_default() -> None:
    """With MIN_BATCH_SIZE=1 no input waits for others."""
    batcher: Batcher[BatchJob] = Batcher(policy(min_batch_size=1, max_wait_s=10))
    batcher.submit(job(5, at=100.0))
    assert isinstance(batcher.next_batch(100.0), Batch)


def test_small_batch_starts_when_its_oldest_input_has_waited_long_enough() -> None:
    """A batch with fewer than MIN_BATCH_SIZE inputs starts MAX_WAIT_TIME_MS after the oldest one arrived."""
    batcher: Batcher[BatchJob] = Batcher(policy(min_batch_size=4, max_wait_s=0.05))
    batcher.submit(job(5, at=100.0))
    batcher.submit(job(5, at=100.03))
    assert batcher.next_batch(100.04) == pytest.approx(100.05)
    assert len(take(batcher, 100.05).members) == 2


def test_minimum_number_of_inputs_starts_a_batch() -> None:
    """MIN_BATCH_SIZE inputs start a batch at once, whichever requests they belong to."""
    batcher: Batcher[BatchJob] = Batcher(policy(min_batch_size=4, max_wait_s=10))
    batcher.submit(job(5, 5, 5, at=100.0))
    assert batcher.next_batch(100.0) == pytest.approx(110.0)
    batcher.submit(job(5, at=101.0))
    assert len(take(batcher, 101.0).members) == 4


def test_cancelled_request_leaves_the_queue() -> None:
    """A cancelled request is not counted and does not run. The others do."""
    batcher: Batcher[BatchJob] = Batcher(policy())
    cancelled, other = job(*[10] * 100), job(7, 7)
    batcher.submit(cancelled)
    batcher.submit(other)
    batcher.cancel(cancelled)
    assert (batcher.waiting_inputs, batcher.waiting_tokens) == (2, 14)
    assert {member for batch in drain(batcher) for member, _ in batch.members} == {other}


def test_running_request_can_be_cancelled() -> None:
    """The counts are correct after cancelling twice, and after the first batch."""
    batcher: Batcher[BatchJob] = Batcher(policy())
    started = job(*[10] * 20)
    batcher.submit(started)
    take(batcher)
    batcher.cancel(started)
    batcher.cancel(started)
    assert (batcher.waiting_inputs, batcher.waiting_tokens) == (0, 0)
    assert batcher.next_batch(0.0) is None


def test_request_without_inputs_is_rejected() -> None:
    """A request without inputs would never be answered."""
    with pytest.raises(ValueError, match="at least one"):
        BatchJob([])


# --- batches without padding --------------------------------------------------------------------------


def test_packed_batches_are_limited_by_their_tokens() -> None:
    """Inputs of any lengths share a batch, because there is no padding."""
    lengths = [10, 400, 20, 300, 5, 60] * 4
    packed: Batcher[BatchJob] = Batcher(policy(max_batch_size=1024, max_batch_tokens=1600, packs=True))
    packed.submit(job(*lengths))
    batches = drain(packed)
    assert max(batch.tokens for batch in batches) > 1_200
    assert all(batch.tokens == batch.padded_tokens <= 1600 for batch in batches)
    assert len(batches) == 2
    padded: Batcher[BatchJob] = Batcher(policy(max_batch_size=1024, max_batch_tokens=1600))
    padded.submit(job(*lengths))
    assert len(drain(padded)) == 4


def test_load_of_short_texts_fills_packed_batches() -> None:
    """With padding, and 64 inputs at most, they would be 32 batches."""
    batcher: Batcher[BatchJob] = Batcher(policy(max_batch_size=1024, max_batch_tokens=65_536, packs=True))
    for request in range(64):
        batcher.submit(job(*(8 + (request + row) % 11 for row in range(32))))
    assert [len(batch.members) for batch in drain(batcher)] == [1024, 1024]


def test_few_tokens_are_not_dealt_out_to_idle_streams() -> None:
    """Half a batch takes a GPU as long as a whole one."""
    for lengths, sizes in (([10] * 6, [6]), ([100] * 6, [3, 3])):
        batcher: Batcher[BatchJob] = Batcher(policy(shared_from_tokens=500))
        batcher.submit(job(*lengths))
        taken = []
        for idle in (2, 1):
            if isinstance(batch := batcher.next_batch(0.0, idle_streams=idle), Batch):
                taken.append(len(batch.members))
        assert taken == sizes


@given(
    requests=st.lists(st.lists(st.integers(1, 600), min_size=1, max_size=40), min_size=1, max_size=12),
    cancelled=st.sets(st.integers(0, 11)),
    batch_size=st.integers(1, 16),
    batch_tokens=st.integers(1, 2_000),
    dynamic=st.booleans(),
    between=st.integers(0, 3),
)
def test_every_input_runs_exactly_once(
    requests: list[list[int]], cancelled: set[int], batch_size: int, batch_tokens: int, dynamic: bool, between: int
) -> None:
    """For any order of arrivals, cancellations and batches, each input runs once, limits hold, and counts agree."""
    batcher: Batcher[BatchJob] = Batcher(
        policy(max_batch_size=batch_size, max_batch_tokens=batch_tokens, dynamic=dynamic)
    )
    jobs, batches = [job(*lengths) for lengths in requests], []
    for index, request in enumerate(jobs):
        batcher.submit(request)
        for _ in range(between):
            if isinstance(batch := batcher.next_batch(0.0), Batch):
                batches.append(batch)
        if index in cancelled:
            batcher.cancel(request)
    batches += drain(batcher)

    ran = [(id(member), row) for batch in batches for member, row in batch.members]
    assert len(ran) == len(set(ran))
    for request in jobs:
        if not request.cancelled:
            assert {row for identity, row in ran if identity == id(request)} == set(range(len(request.ids)))
    for batch in batches:
        lengths = [len(member.ids[row]) for member, row in batch.members]
        assert len(lengths) <= batch_size
        assert len(lengths) == 1 or batch.padded_tokens <= batch_tokens
        assert (batch.tokens, batch.longest) == (sum(lengths), max(lengths))
    assert (batcher.waiting_inputs, batcher.waiting_tokens) == (0, 0)


# --- exclusive requests ------------------------------------------------------------------------------


def test_exclusive_request_gets_every_second_batch() -> None:
    """It ends soon, however many requests wait, and these do not wait for all of it."""
    batcher: Batcher[BatchJob] = Batcher(policy())
    suspect = job(*[5] * 24)
    suspect.exclusive = True
    others = [job(5) for _ in range(40)]
    for request in (*others, suspect):
        batcher.submit(request)
    batches = drain(batcher)
    owners = [{id(member) for member, _ in batch.members} for batch in batches]
    assert [owner == {id(suspect)} for owner in owners[:6]] == [True, False] * 3
    assert not any(id(suspect) in owner for owner in owners[6:])
    assert sum(len(batch.members) for batch in batches) == 64
    assert (batcher.waiting_inputs, batcher.waiting_tokens) == (0, 0)


def test_exclusive_requests_run_without_others_and_after_cancellations() -> None:
    """Each of their inputs runs once."""
    batcher: Batcher[BatchJob] = Batcher(policy())
    first, second, third, normal = job(5, 5), job(5), job(5, 5), job(5)
    for request in (first, second, third):
        request.exclusive = True
    for request in (first, normal, second, third):
        batcher.submit(request)
    batcher.cancel(first)
    batcher.cancel(normal)
    batches = drain(batcher)
    assert [{id(member) for member, _ in batch.members} for batch in batches] == [{id(second)}, {id(third)}]
    assert sum(len(batch.members) for batch in batches) == 3
    assert batcher.next_batch(0.0) is None


def test_background_requests_run_while_no_other_request_waits() -> None:
    """A request runs before background requests that came earlier, and shares no batch with them."""
    batcher: PriorityBatcher[BatchJob] = PriorityBatcher(policy())
    early, request = background(5, 5), job(5)
    batcher.submit(early)
    batcher.submit(request)
    assert take(batcher).members == [(request, 0)]
    assert {id(member) for member, _ in take(batcher).members} == {id(early)}
    assert batcher.next_batch(0.0) is None


def test_background_requests_get_their_share_while_requests_always_wait() -> None:
    """They get `BACKGROUND_SHARE` of the tokens, not more."""
    batcher: PriorityBatcher[BatchJob] = PriorityBatcher(policy(max_batch_size=10))
    batcher.submit(background(*[10] * 2000))
    tokens = {False: 0, True: 0}
    for _ in range(1000):
        batcher.submit(job(*[10] * 10))
        batch = take(batcher)
        tokens[batch.members[0][0].background] += batch.tokens
    assert tokens[True] / sum(tokens.values()) == pytest.approx(BACKGROUND_SHARE, abs=0.01)


def test_background_requests_do_not_save_up_their_share() -> None:
    """After a pause they owe nothing and are owed nothing."""
    batcher: PriorityBatcher[BatchJob] = PriorityBatcher(policy(max_batch_size=10))
    for _ in range(1000):
        batcher.submit(job(*[10] * 10))
        take(batcher)
    batcher.submit(background(*[10] * 20))
    batcher.submit(job(*[10] * 20))
    assert [take(batcher).members[0][0].background for _ in range(4)] == [False, True, False, True]


def test_a_background_batch_runs_while_requests_wait_for_others() -> None:
    """MIN_BATCH_SIZE holds requests back, not background requests."""
    batcher: PriorityBatcher[BatchJob] = PriorityBatcher(policy(min_batch_size=4, max_wait_s=1.0))
    batcher.submit(job(5, at=0.0))
    assert batcher.next_batch(0.5) == 1.0
    batcher.submit(background(5))
    assert take(batcher, 0.5).members[0][0].background
    assert batcher.next_batch(0.5) == 1.0


def test_background_requests_are_served_in_order() -> None:
    """The second one fills the last batch of the first one."""
    batcher: PriorityBatcher[BatchJob] = PriorityBatcher(policy(max_batch_size=4))
    first, second = background(*[5] * 6), background(*[5] * 6)
    batcher.submit(first)
    batcher.submit(second)
    owners = [[1 if member is first else 2 for member, _ in take(batcher).members] for _ in range(3)]
    assert owners == [[1, 1, 1, 1], [1, 1, 2, 2], [2, 2, 2, 2]]


def test_background_batches_have_a_limit_of_their_own() -> None:
    """Requests wait for their end."""
    batcher: PriorityBatcher[BatchJob] = PriorityBatcher(policy(max_background_tokens=30))
    batcher.submit(background(*[10] * 6))
    batcher.submit(job(*[10] * 6))
    assert [len(take(batcher, 2.0).members) for _ in range(3)] == [6, 3, 3]


def test_background_batches_are_half_as_large_while_other_requests_come() -> None:
    """A request waits half as long for their end. Without requests they are as large as before."""
    batcher: PriorityBatcher[BatchJob] = PriorityBatcher(policy(max_background_tokens=40))
    batcher.submit(background(*[10] * 20))
    batcher.submit(job(10, at=5.0))
    sizes = [len(take(batcher, now).members) for now in (5.0, 5.0, 5.9, 6.1, 6.2)]
    batcher.submit(job(10, at=7.0))
    sizes += [len(take(batcher, now).members) for now in (7.0, 7.0)]
    assert sizes == [1, 2, 2, 4, 4, 1, 2]


def test_cancelled_background_requests_do_not_run() -> None:
    batcher: PriorityBatcher[BatchJob] = PriorityBatcher(policy())
    first, second = background(5, 5), background(5)
    batcher.submit(first)
    batcher.submit(second)
    batcher.cancel(first)
    assert batcher.waiting_inputs == 1
    assert take(batcher).members == [(second, 0)]
    assert batcher.foreground_tokens == batcher.waiting_tokens == 0
