"""The requests and batches of the last two minutes, by second, for people who watch the service."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

PERIOD_S = 120
"""How many seconds are kept."""
RECENT_S = 10
"""Period of the figures that are shown as the present ones, in seconds."""
_MAX_LATENCIES = 64
"""Latencies that are kept for a second. If there are more, the last ones count."""
_MAX_FAILURES = 20


@dataclass(slots=True)
class Second:
    """What happened in one second."""

    requests: int = 0
    """Answered requests for embeddings, failed ones included."""
    tokens: int = 0
    latencies_s: list[float] = field(default_factory=list)
    """Of requests that did not fail."""
    batches: int = 0
    batch_inputs: int = 0
    batch_tokens: int = 0
    padded_tokens: int = 0

    def add_latency(self, duration_s: float) -> None:
        if len(self.latencies_s) < _MAX_LATENCIES:
            self.latencies_s.append(duration_s)
        else:
            self.latencies_s[self.requests % _MAX_LATENCIES] = duration_s


@dataclass(frozen=True, slots=True)
class Figures:
    """Rates, latencies and batches of a period. None: there were no requests, or no batches."""

    requests_per_s: float
    tokens_per_s: float
    p50_s: float | None
    p95_s: float | None
    inputs_per_batch: float | None
    padding: float | None
    """Share of padding among the tokens of all batches, 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A request that failed. It has no message, because messages can quote inputs."""

    at: float
    """Unix time in seconds."""
    status: int
    code: str
    """Machine-readable name of the error; empty if the client disconnected."""
    model: str
    path: str
    request_id: str


class Activity:
    """Counts requests and batches by second. Thread-safe; each call takes about a microsecond."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._seconds: dict[int, Second] = {}
        self._failures: deque[Failure] = deque(maxlen=_MAX_FAILURES)

    def on_request(self, duration_s: float, tokens: int, failure: Failure | None) -> None:
        with self._lock:
            second = self._present()
            second.requests += 1
            second.tokens += tokens
            if failure is None:
                second.add_latency(duration_s)
            else:
                self._failures.appendleft(failure)

    def on_batch(self, inputs: int, tokens: int, padded_tokens: int) -> None:
        with self._lock:
            second = self._present()
            second.batches += 1
            second.batch_inputs += inputs
            second.batch_tokens += tokens
            second.padded_tokens += padded_tokens

    def take(self) -> tuple[dict[int, Second], list[Failure]]:
        """Return what happened in the seconds that are over, and forget it. For a worker that reports it to the primary."""
        with self._lock:
            now = int(self._clock())
            seconds = {each: self._seconds.pop(each) for each in list(self._seconds) if each < now}
            failures = list(self._failures)
            self._failures.clear()
        return seconds, failures

    def add(self, seconds: Mapping[int, Second], failures: Sequence[Failure]) -> None:
        """Add what happened in another worker, whose clock is the same."""
        with self._lock:
            for number, other in seconds.items():
                second = self._seconds.setdefault(number, Second())
                second.requests += other.requests
                second.tokens += other.tokens
                second.latencies_s += other.latencies_s
                second.batches += other.batches
                second.batch_inputs += other.batch_inputs
                second.batch_tokens += other.batch_tokens
                second.padded_tokens += other.padded_tokens
            self._failures.extendleft(reversed(failures))

    def failures(self) -> list[Failure]:
        """Return the last failures, the latest first."""
        with self._lock:
            return list(self._failures)

    def figures(self) -> Figures:
        """Return the figures of the last `RECENT_S` seconds that are over."""
        return self.history(RECENT_S, RECENT_S)[0]

    def history(self, period_s: int = PERIOD_S, step_s: int = 1) -> list[Figures]:
        """Return the figures of the last `period_s` seconds that are over, for each `step_s` of them, the oldest first."""
        empty = Second()
        with self._lock:
            now = int(self._clock())
            seconds = [self._seconds.get(each, empty) for each in range(now - period_s, now)]
            return [_figures(seconds[start : start + step_s]) for start in range(0, period_s, step_s)]

    def _present(self) -> Second:
        now = int(self._clock())
        second = self._seconds.get(now)
        if second is None:
            second = self._seconds[now] = Second()
            for old in [each for each in self._seconds if each < now - PERIOD_S]:
                del self._seconds[old]
        return second


def _figures(seconds: list[Second]) -> Figures:
    batches = sum(second.batches for second in seconds)
    padded = sum(second.padded_tokens for second in seconds)
    latencies = sorted(latency for second in seconds for latency in second.latencies_s)
    return Figures(
        requests_per_s=sum(second.requests for second in seconds) / len(seconds),
        tokens_per_s=sum(second.tokens for second in seconds) / len(seconds),
        p50_s=_quantile(latencies, 0.5),
        p95_s=_quantile(latencies, 0.95),
        inputs_per_batch=sum(second.batch_inputs for second in seconds) / batches if batches else None,
        padding=1 - sum(second.batch_tokens for second in seconds) / padded if padded else None,
    )


def _quantile(ordered: list[float], share: float) -> float | None:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None
