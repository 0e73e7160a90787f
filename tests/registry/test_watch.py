"""What the registry does by itself: unload who is not asked any more, and tell who hangs."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from emb_model_provider.registry import State
from emb_model_provider.registry.model_entry import WINDOW_S, RequestStats
from tests.registry.conftest import until

if TYPE_CHECKING:
    from collections.abc import Callable


async def test_idle_model_is_unloaded_and_comes_back(fleet: Callable[..., Any]) -> None:
    """After IDLE_UNLOAD_S without a request a model leaves; one with a request does not, however long that takes."""
    async with fleet(*"ab", idle_unload_s=0.2) as models:
        watching = asyncio.create_task(models.registry.watch())
        try:
            held = await models.held("b")
            await models.embed("a")
            await until(lambda: models.state("a") is State.UNLOADED)
            assert models.registry.status("a").unload_reason == "idle"
            assert models.state("b") is State.READY
            assert len(await models.embed("a")) == 1
            models["b"].backend.gate.set()
            await held
            await until(lambda: models.unloads().get("b") == {"idle": 1})
        finally:
            watching.cancel()
            with suppress(asyncio.CancelledError):
                await watching


async def test_model_left_behind_is_still_told_of(fleet: Callable[..., Any]) -> None:
    """What hangs costs the process, also when it was unloaded: nothing else gives its memory and its thread back."""
    said: list[str] = []
    async with fleet("a", watchdog_s=0.05, request_timeout_s=0.3) as models:
        held = await models.held("a")
        await asyncio.gather(held, models.registry.unload("a"), return_exceptions=True)
        assert models.state("a") is State.UNLOADED
        watching = asyncio.create_task(models.registry.watch(said.append))
        await until(lambda: said)
        models["a"].backend.gate.set()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    assert said[0].startswith("model a hangs:")


async def test_requests_are_counted_when_they_end(fleet: Callable[..., Any]) -> None:
    """Answered ones count, those that fail do not; both are uses."""
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


def test_only_the_last_minute_is_summed_up() -> None:
    """Requests a second and the 95th percentile are those of the window, also where more came than are kept."""
    stats = RequestStats()
    assert stats.recent() == (0.0, None)
    now = 1000.0
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
