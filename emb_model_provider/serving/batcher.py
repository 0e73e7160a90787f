"""Chooses the inputs that run together next. Pure logic, without threads, a model or a clock.

Requests share the model fairly by *virtual time* (start-time fair queuing). The request with the lowest tag is served
first: the virtual time at which it arrived plus its tokens that have run since. Each batch advances the virtual time by
its tokens, divided by the number of waiting requests. So a request of one short text runs between the batches of a
request of 2048 documents, and newer requests cannot starve it. The longest input of the first request leads a batch;
other inputs are added as long as padding stays cheap.
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

BACKGROUND_SHARE = 0.05
"""Share of the tokens that background requests get while other requests wait."""
_SHORT_BATCHES_S = 1.0
"""How long background batches are half as large after another request has come, so that the next one waits half as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPolicy:
    """Limits of a batch. Lengths and budgets in tokens, times in seconds."""

    max_batch_size: int
    max_batch_tokens: int
    """Limit of padded tokens: the number of inputs times the longest input, or without padding the sum of their lengths.
    An input that exceeds it runs alone."""
    min_batch_size: int = 1
    max_wait_s: float = 0.0
    dynamic: bool = True
    """Whether inputs of different requests can share a batch."""
    free_padded_tokens: int = 256
    """Up to this size the cost of a batch hardly depends on its padding."""
    max_padding_share: float = 0.25
    """Share of padding up to which one larger batch is faster than two smaller ones."""
    packs: bool = False
    """Whether batches have no padding, so that they cost their tokens, whatever the lengths of their inputs."""
    shared_from_tokens: int = 0
    """Waiting inputs of fewer tokens are one batch, instead of one for each idle stream."""
    max_background_tokens: int = 2**31
    """Limit of padded tokens of a background batch, for whose end a request may wait."""
    assumed_tokens_per_s: float = 5_000.0
    """Speed of a stream until its first batches are measured."""


class BatchJob:
    """The inputs of one request while they wait and run."""

    __slots__ = ("_lengths", "_rows", "_tag", "arrived_at", "background", "cancelled", "exclusive", "ids", "waiting_tokens")  # fmt: skip

    def __init__(self, ids: Sequence[Sequence[int]], *, arrived_at: float = 0.0, background: bool = False) -> None:
        if not ids:
            raise ValueError("a request needs at least one input")
        self.ids = ids
        self.arrived_at = arrived_at
        """When it was submitted, on the clock of `Batcher.next_batch`."""
        self.background = background
        """Whether it runs only while no other request waits, except for a small share."""
        self.cancelled = False
        self.exclusive = False
        """Whether its inputs share no batch with other requests. Such requests get every second batch."""
        self._tag = 0.0
        self.reset()

    @property
    def waiting(self) -> int:
        """Number of inputs that are not in a batch yet."""
        return len(self._rows)

    def reset(self) -> None:
        """Mark all inputs as waiting. The request must not be in a batcher."""
        lengths = [len(row) for row in self.ids]
        self.waiting_tokens = sum(lengths)
        self._rows = sorted(range(len(lengths)), key=lengths.__getitem__)
        self._lengths = sorted(lengths)

    def _nearest(self, length: int) -> int:
        """Return the position of the waiting input whose length is nearest to `length`; of two, the shorter one."""
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
    """Inputs that run together. A member is a request and the row of its `ids`."""

    members: list[tuple[JobT, int]]
    tokens: int
    longest: int
    packs: bool = False

    @property
    def padded_tokens(self) -> int:
        """Number of tokens that are computed."""
        return self.tokens if self.packs else len(self.members) * self.longest


class Batcher(Generic[JobT]):
    """The waiting requests of one model. Not thread-safe; its owner holds a lock."""

    def __init__(self, policy: BatchPolicy, *, in_order: bool = False) -> None:
        """Create a batcher; `in_order` serves requests in the order of their arrival, instead of sharing the model fairly."""
        self._base_policy = self._policy = policy
        self._in_order = in_order
        self._heap: list[tuple[float, int, int, JobT]] = []
        self._exclusive: deque[JobT] = deque()
        """Requests that share no batch. The others are in the heap."""
        self._last_was_exclusive = False
        self._sequence = count()
        self._virtual_time = 0.0
        self._jobs = 0
        self._lowered_until = 0.0
        self.waiting_inputs = 0
        self.waiting_tokens = 0

    def lower_budget(self, padded_tokens: int, *, until: float) -> None:
        """Limit batches of several inputs to `padded_tokens` until a time on the clock of `next_batch`."""
        budget = max(1, min(padded_tokens, self._policy.max_batch_tokens))
        self._policy = replace(self._policy, max_batch_tokens=budget)
        self._lowered_until = until

    def drained(self) -> Batcher[JobT]:
        """Return an empty batcher with the same policy."""
        return Batcher(self._base_policy, in_order=self._in_order)

    def submit(self, job: JobT) -> None:
        job._tag = self._virtual_time
        self._push(job)
        self._jobs += 1
        self.waiting_inputs += job.waiting
        self.waiting_tokens += job.waiting_tokens

    def cancel(self, job: JobT) -> None:
        """Remove the waiting inputs of a request. Inputs that are running are not affected."""
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
        self, now: float, *, idle_streams: int = 1, may_wait: bool = True, max_tokens: int | None = None
    ) -> Batch[JobT] | float | None:
        """Return the next batch; the time of the next call if waiting for more inputs pays; None if no input waits.

        Args:
            now: The current time in seconds.
            idle_streams: Number of idle streams, including the caller's. They share the waiting inputs.
            may_wait: Whether a batch smaller than the minimum may wait for more inputs. False if none will come.
            max_tokens: Limit of padded tokens of this batch, if it is lower than that of the policy.
        """
        if not self.waiting_inputs:
            return None
        if self._policy is not self._base_policy and now >= self._lowered_until:
            self._policy = self._base_policy
        policy = self._policy
        if may_wait and policy.dynamic and self.waiting_inputs < policy.min_batch_size:
            waiting = (*self._exclusive, *(job for *_, job in self._heap))
            wait_until = min(job.arrived_at for job in waiting if job.waiting) + policy.max_wait_s
            if now < wait_until:
                return wait_until
        if self.waiting_tokens < policy.shared_from_tokens:
            idle_streams = 1
        if max_tokens is not None and max_tokens < policy.max_batch_tokens:
            policy = replace(policy, max_batch_tokens=max_tokens)
        return self._form(min(policy.max_batch_size, -(-self.waiting_inputs // idle_streams)), policy)

    def _push(self, job: JobT) -> None:
        if job.exclusive:
            self._exclusive.append(job)
            return
        # Of two equal tags the smaller request comes first, because it delays the other one less.
        heapq.heappush(self._heap, (job._tag, job.waiting_tokens, next(self._sequence), job))

    def _form(self, max_size: int, policy: BatchPolicy) -> Batch[JobT]:
        candidates = self._candidates(2 * max_size)
        builder = _BatchBuilder(candidates[0], max_size, policy)
        if len(candidates) > 1 and not self._in_order:
            # First a share for each request, so that a large one does not fill the batch alone.
            share = max(1, max_size // len(candidates))
            for job in candidates:
                builder.add_from(job, share)
        for job in candidates:
            builder.add_from(job, max_size)

        batch = Batch(builder.members, builder.tokens, builder.longest, self._policy.packs)
        self.waiting_inputs -= len(batch.members)
        self.waiting_tokens -= batch.tokens
        # Divided by all waiting requests, not only the candidates, because all of them share the virtual time.
        self._virtual_time += batch.tokens / self._jobs
        if not self._in_order:
            for job, row in batch.members:
                job._tag += len(job.ids[row])
        for job in candidates:
            if job.waiting:
                self._push(job)
            else:
                self._jobs -= 1
        return batch

    def _candidates(self, limit: int) -> list[JobT]:
        """Remove the requests that can join the next batch from the heap, and return them in order."""
        if (job := self._next_exclusive()) is not None:
            return [job]
        if not self._policy.dynamic:
            limit = 1
        candidates: list[JobT] = []
        while self._heap and len(candidates) < limit:
            job = heapq.heappop(self._heap)[-1]
            if job.waiting:
                candidates.append(job)
        # All requests of the heap may have been cancelled.
        return candidates or [self._exclusive.popleft()]

    def _next_exclusive(self) -> JobT | None:
        """Remove and return the request that gets the next batch exclusively, or None."""
        while self._exclusive and not self._exclusive[0].waiting:
            self._exclusive.popleft()
        self._last_was_exclusive = bool(self._exclusive) and (not self._last_was_exclusive or not self._heap)
        return self._exclusive.popleft() if self._last_was_exclusive else None


class PriorityBatcher(Generic[JobT]):
    """Two batchers: background requests run while no other request waits. Not thread-safe; its owner holds a lock.

    Batches are not mixed: inputs of background requests would make a batch of other requests longer. So a request waits for
    at most one background batch of each stream; while requests come, these batches are half as large. Background requests
    get a share of `BACKGROUND_SHARE` of the tokens even if other requests always wait. They are served in order, so that a
    batch of the Batch API has the next lines ready when the model has computed the first ones; those of different owners
    take turns before they get here.
    """

    def __init__(self, policy: BatchPolicy) -> None:
        self._policy = policy
        self._foreground: Batcher[JobT] = Batcher(policy)
        background_tokens = min(policy.max_batch_tokens, policy.max_background_tokens)
        self._background: Batcher[JobT] = Batcher(
            replace(policy, max_batch_tokens=background_tokens, min_batch_size=1, max_wait_s=0.0), in_order=True
        )
        self._short_tokens = max(1, background_tokens // 2)
        self._short_until = float("-inf")
        self._owed_tokens = 0.0
        """Share of the background requests that they did not get. Negative after one of their batches."""

    def lower_budget(self, padded_tokens: int, *, until: float) -> None:
        """Limit batches of several inputs to `padded_tokens` until a time on the clock of `next_batch`."""
        self._foreground.lower_budget(padded_tokens, until=until)
        self._background.lower_budget(padded_tokens, until=until)

    def drained(self) -> PriorityBatcher[JobT]:
        """Return an empty batcher with the same policy."""
        return PriorityBatcher(self._policy)

    def submit(self, job: JobT) -> None:
        if not job.background:
            self._short_until = job.arrived_at + _SHORT_BATCHES_S
        self._batcher(job).submit(job)

    def cancel(self, job: JobT) -> None:
        """Remove the waiting inputs of a request. Inputs that are running are not affected."""
        self._batcher(job).cancel(job)

    def next_batch(self, now: float, *, idle_streams: int = 1, may_wait: bool = True) -> Batch[JobT] | float | None:
        """Return the next batch as `Batcher.next_batch` does."""
        if self._owed_tokens <= 0 or not self._background.waiting_inputs:
            decision = self._foreground.next_batch(now, idle_streams=idle_streams, may_wait=may_wait)
            if isinstance(decision, Batch):
                if self._background.waiting_inputs:
                    self._owed_tokens += BACKGROUND_SHARE * decision.padded_tokens
                return decision
        else:
            decision = None
        batch = self._background.next_batch(
            now,
            idle_streams=idle_streams,
            may_wait=may_wait,
            max_tokens=self._short_tokens if now < self._short_until else None,
        )
        if not isinstance(batch, Batch):
            return decision
        self._owed_tokens = self._owed_tokens - batch.padded_tokens if self._foreground.waiting_inputs else 0.0
        return batch

    @property
    def waiting_inputs(self) -> int:
        return self._foreground.waiting_inputs + self._background.waiting_inputs

    @property
    def waiting_tokens(self) -> int:
        return self._foreground.waiting_tokens + self._background.waiting_tokens

    @property
    def foreground_tokens(self) -> int:
        """Tokens that wait in requests that are not in the background."""
        return self._foreground.waiting_tokens

    def _batcher(self, job: JobT) -> Batcher[JobT]:
        return self._background if job.background else self._foreground


class _BatchBuilder(Generic[JobT]):
    """Fills a batch, starting with the longest waiting input of the first request."""

    def __init__(self, first: JobT, max_size: int, policy: BatchPolicy) -> None:
        self._max_size = max_size
        self._policy = policy
        self.lead = self.longest = self.tokens = first._lengths[-1]
        self.members = [(first, first._take(len(first._lengths) - 1))]

    def add_from(self, job: JobT, limit: int) -> None:
        """Add up to `limit` inputs of a request, in order of their distance in length from the leading input."""
        for _ in range(min(limit, len(job._lengths))):
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
        if policy.packs:
            return size <= self._max_size and self.tokens + length <= policy.max_batch_tokens
        padded = size * max(self.longest, length)
        if size > self._max_size or padded > policy.max_batch_tokens:
            return False
        padding = padded - self.tokens - length
        return padded <= policy.free_padded_tokens or padding <= policy.max_padding_share * padded
