"""Which waiting inputs run together next: pure logic, without threads, a model or a clock of its own.

Fairness is between requests, not inputs: each request has a tag in *virtual time*, which says how many
tokens of service it has had, counted from where everybody stood when it came (start-time fair queuing).
The request with the lowest tag goes first, so a request of one short text passes between the batches of
one with 2048 documents. Virtual time moves on with every batch by the tokens it ran, shared among the
requests that wait, and a newcomer starts at the present virtual time: so nobody is passed over for long,
however many newcomers there are.

The first request's longest input leads a batch; others join while padding stays cheap.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPolicy:
    """What a batch may be. Lengths and budgets in tokens, times in seconds."""

    max_batch_size: int
    max_batch_tokens: int
    """Padded tokens: inputs times the longest. One input that is longer on its own still runs, alone."""
    min_batch_size: int = 1
    max_wait_s: float = 0.0
    dynamic: bool = True
    """False: inputs of different requests never share a batch."""
    free_padded_tokens: int = 256
    """A batch up to this size costs about the same however much of it is padding."""
    max_padding_share: float = 0.25
    """Share of padding up to which a larger batch is better than two smaller ones."""


class BatchJob:
    """One request's inputs while they wait and run."""

    __slots__ = ("_lengths", "_rows", "_tag", "arrived_at", "cancelled", "exclusive", "ids", "waiting_tokens")

    def __init__(self, ids: Sequence[Sequence[int]], *, arrived_at: float = 0.0) -> None:
        if not ids:
            raise ValueError("a job needs at least one input")
        self.ids = ids
        self.arrived_at = arrived_at
        """When it was submitted, on the caller's clock, in seconds."""
        self.cancelled = False
        self.exclusive = False
        """Whether its inputs share no batch with those of others; every other batch is then theirs."""
        self.waiting_tokens = 0
        """Tokens of the inputs that are not in a batch yet."""
        self._rows: list[int] = []
        self._lengths: list[int] = []
        self._tag = 0.0
        self.reset()

    @property
    def waiting(self) -> int:
        """How many inputs are not in a batch yet."""
        return len(self._rows)

    def reset(self) -> None:
        """Let all inputs wait. The job must not be in a batcher."""
        ids = self.ids
        self.waiting_tokens = sum(map(len, ids))
        self._rows = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        self._lengths = [len(ids[row]) for row in self._rows]

    def _nearest(self, length: int) -> int:
        """Return the position of the waiting input whose length is nearest to `length`, the shorter on a tie."""
        position = bisect_left(self._lengths, length)
        if position == len(self._lengths):
            return position - 1
        if position and length - self._lengths[position - 1] <= self._lengths[position] - length:
            return position - 1
        return position

    def _take(self, position: int) -> int:
        self.waiting_tokens -= self._lengths.pop(position)
        return self._rows.pop(position)


JobT = TypeVar("JobT", bound=BatchJob)


@dataclass(frozen=True, slots=True)
class Batch(Generic[JobT]):
    """Inputs that run together: `members[i]` is a job and the row of its `ids`."""

    members: list[tuple[JobT, int]]
    tokens: int
    longest: int

    @property
    def padded_tokens(self) -> int:
        return len(self.members) * self.longest


class Batcher(Generic[JobT]):
    """Jobs that wait for one model. Not thread-safe: its owner holds a lock."""

    def __init__(self, policy: BatchPolicy) -> None:
        self._own_policy = self._policy = policy
        self._heap: list[tuple[float, int, int, JobT]] = []
        self._exclusive: deque[JobT] = deque()
        """Jobs that share no batch; the rest are in the heap."""
        self._last_was_exclusive = False
        self._sequence = count()
        self._virtual_time = 0.0
        self._jobs = 0
        self._lowered_until = 0.0
        self.waiting_inputs = 0
        self.waiting_tokens = 0

    def lower_budget(self, padded_tokens: int, *, until: float) -> None:
        """Keep batches of several inputs within `padded_tokens` until that time, on the clock of `next_batch`."""
        budget = max(1, min(padded_tokens, self._policy.max_batch_tokens))
        self._policy = replace(self._policy, max_batch_tokens=budget)
        self._lowered_until = until

    def drained(self) -> Batcher[JobT]:
        """Return a batcher of the same policy in which nothing waits."""
        return Batcher(self._own_policy)

    def submit(self, job: JobT) -> None:
        """Let all inputs of `job` wait."""
        job._tag = self._virtual_time
        self._push(job)
        self._jobs += 1
        self.waiting_inputs += job.waiting
        self.waiting_tokens += job.waiting_tokens

    def cancel(self, job: JobT) -> None:
        """Take what still waits of `job` out of the queue. Inputs that already run are not affected."""
        if job.cancelled:
            return
        job.cancelled = True
        if job.waiting:
            self.waiting_inputs -= job.waiting
            self.waiting_tokens -= job.waiting_tokens
            self._jobs -= 1
            job._rows.clear()
            job._lengths.clear()
            job.waiting_tokens = 0
        if not self._jobs:
            self._heap.clear()
            self._exclusive.clear()

    def next_batch(
        self, now: float, *, idle_streams: int = 1, may_wait: bool = True
    ) -> Batch[JobT] | float | None:
        """Return the next batch; or, where it pays to wait for more, when to ask again; or None if nothing waits.

        With several `idle_streams`, the asking one included, what waits is dealt out among them. Where nobody else will
        come, it `may_wait` no more.
        """
        if not self.waiting_inputs:
            return None
        if self._policy is not self._own_policy and now >= self._lowered_until:
            self._policy = self._own_policy
        policy = self._policy
        if may_wait and policy.dynamic and self.waiting_inputs < policy.min_batch_size:
            waiting = (*self._exclusive, *(job for *_, job in self._heap))
            wait_until = min(job.arrived_at for job in waiting if job.waiting) + policy.max_wait_s
            if now < wait_until:
                return wait_until
        return self._form(min(policy.max_batch_size, -(-self.waiting_inputs // idle_streams)))

    def _push(self, job: JobT) -> None:
        if job.exclusive:
            self._exclusive.append(job)
            return
        # Among equals the smaller goes first: it holds the other up for less.
        heapq.heappush(self._heap, (job._tag, job.waiting_tokens, next(self._sequence), job))

    def _form(self, most: int) -> Batch[JobT]:
        candidates = self._candidates(2 * most)
        builder = _BatchBuilder(candidates[0], most, self._policy)
        if len(candidates) > 1:
            # A share for each first, so that a large request does not fill the batch before a small one's turn.
            share = max(1, most // len(candidates))
            for job in candidates:
                builder.add_from(job, share)
        for job in candidates:
            builder.add_from(job, most)

        batch = Batch(members=builder.members, tokens=builder.tokens, longest=builder.longest)
        self.waiting_inputs -= len(batch.members)
        self.waiting_tokens -= batch.tokens
        # Requests behind the candidates share in virtual time too, hence all jobs, not just these.
        self._virtual_time += batch.tokens / self._jobs
        for job, row in batch.members:
            job._tag += len(job.ids[row])
        for job in candidates:
            if job.waiting:
                self._push(job)
            else:
                self._jobs -= 1
        return batch

    def _candidates(self, most: int) -> list[JobT]:
        """Take the jobs that may join the next batch off the heap, the one whose turn it is first."""
        if (job := self._next_exclusive()) is not None:
            return [job]
        limit = most if self._policy.dynamic else 1
        candidates: list[JobT] = []
        while self._heap and len(candidates) < limit:
            job = heapq.heappop(self._heap)[-1]
            if job.waiting:
                candidates.append(job)
        # Those of the heap may all have been cancelled.
        return candidates or [self._exclusive.popleft()]

    def _next_exclusive(self) -> JobT | None:
        """Take the job that has the next batch to itself, if it is such a one's turn."""
        while self._exclusive and not self._exclusive[0].waiting:
            self._exclusive.popleft()
        self._last_was_exclusive = bool(self._exclusive) and (not self._last_was_exclusive or not self._heap)
        return self._exclusive.popleft() if self._last_was_exclusive else None


class _BatchBuilder(Generic[JobT]):
    """A batch in the making, led by the longest waiting input of the job whose turn it is."""

    def __init__(self, first: JobT, most: int, policy: BatchPolicy) -> None:
        self._most = most
        self._policy = policy
        self.lead = self.longest = self.tokens = first._lengths[-1]
        self.members = [(first, first._take(len(first._lengths) - 1))]

    def add_from(self, job: JobT, most: int) -> None:
        """Add up to `most` of `job`'s inputs, nearest in length to the leading one first, while it pays."""
        for _ in range(min(most, len(job._lengths))):
            position = job._nearest(self.lead)
            if not self._fits(job._lengths[position]):
                return
            length = job._lengths[position]
            self.members.append((job, job._take(position)))
            self.tokens += length
            self.longest = max(self.longest, length)

    def _fits(self, length: int) -> bool:
        policy = self._policy
        size = len(self.members) + 1
        padded = size * max(self.longest, length)
        if size > self._most or padded > policy.max_batch_tokens:
            return False
        padding = padded - self.tokens - length
        return padded <= policy.free_padded_tokens or padding <= policy.max_padding_share * padded
