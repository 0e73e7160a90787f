"""How much a model is asked, and how quickly it answers: counted as requests end, summed up when somebody looks."""

from __future__ import annotations

import time
from collections import deque

WINDOW_S = 60.0
"""How far back requests a second and the 95th percentile look."""
_KEPT = 1024
"""Requests that are looked back at, at most; where more came within the window, the last of them speak for it."""


class Usage:
    """The requests of one model. Used on one event loop; `note` costs less than a microsecond."""

    def __init__(self) -> None:
        self.served = 0
        """Requests that were answered."""
        self.last: float | None = None
        """When one last ended, `time.monotonic()`."""
        self._recent: deque[tuple[float, float]] = deque(maxlen=_KEPT)

    def note(self, began: float, ended: float, *, answered: bool) -> None:
        """Count a request, its times as `time.monotonic()` has them."""
        self.last = ended
        if answered:
            self.served += 1
            self._recent.append((ended, ended - began))

    @property
    def last_unix(self) -> float | None:
        """When a request last ended, Unix time in seconds."""
        return None if self.last is None else time.time() - (time.monotonic() - self.last)

    def recent(self, now: float | None = None) -> tuple[float, float | None]:
        """Return answered requests a second, and the time in seconds that 95 % of them took at most.

        Of the last minute before `now`, which is the present unless it is given.
        """
        now = time.monotonic() if now is None else now
        within = [(ended, took) for ended, took in self._recent if now - ended <= WINDOW_S]
        if not within:
            return 0.0, None
        # A full memory may go back less far than the window does.
        since = now - within[0][0] if len(within) == _KEPT else WINDOW_S
        times = sorted(took for _, took in within)
        return len(within) / max(since, 1e-3), times[min(len(times) - 1, int(0.95 * len(times)))]
