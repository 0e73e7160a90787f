"""Statistics of the requests of a model."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from emb_model_provider.registry.model_entry import WINDOW_S, RequestStats

if TYPE_CHECKING:
    from collections.abc import Callable


async def test_requests_are_counted_when_they_end(fleet: Callable[..., Any]) -> None:
    """Only answered requests are counted, but failed ones are uses of the model too."""
    async with fleet("a") as models:
        assert models.registry.status("a").last_used is None
        await models.embed("a")
        await models.embed("a")
        first = models.registry.status("a")
        assert first.requests_served == 2
        assert first.requests_per_s > 0
        assert first.p95_s is not None
        assert first.last_used is not None
        with suppress(ZeroDivisionError):
            async with models.registry.lease("a"):
                raise ZeroDivisionError
        second = models.registry.status("a")
        assert second.requests_served == 2
        assert second.last_used is not None
        assert second.last_used >= first.last_used


def test_rate_and_latency_are_those_of_the_last_minute() -> None:
    """They are also correct if there are more requests than are kept."""
    stats = RequestStats()
    now = 1000.0
    assert stats.recent(now) == (0.0, None)
    stats.record(0.0, now - WINDOW_S - 1, answered=True)
    for took in range(1, 101):
        stats.record(now - took, now, answered=True)
    rate, p95_s = stats.recent(now)
    assert rate == 100 / WINDOW_S
    assert p95_s == 96
    for _ in range(5000):
        stats.record(now, now + 10, answered=True)
    rate, p95_s = stats.recent(now + 20)
    assert p95_s == 10
    assert 1024 / WINDOW_S < rate <= 5000 / 10
    assert stats.served == 5101
