"""Models leave memory without a request noticing."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.errors import DeadlineExceededError, ModelNotReadyError
from emb_model_provider.registry import State
from tests.registry.conftest import until
from tests.serving.fakes import BREAKS

if TYPE_CHECKING:
    from collections.abc import Callable


async def test_requests_in_flight_are_answered_before_a_model_leaves(fleet: Callable[..., Any]) -> None:
    """Those that were there are answered by the old engine, those that come meanwhile by a new one."""
    async with fleet("a") as models:
        held = await models.held("a")
        unloading = asyncio.create_task(models.registry.unload("a"))
        await until(lambda: models.state("a") is State.UNLOADING)
        late = asyncio.create_task(models.embed("a"))
        await asyncio.sleep(0.01)
        assert not models["a"].backend.closed
        assert not late.done()
        models["a"].backend.gate.set()
        assert len(await held) == 1
        assert len(await late) == 1
        await unloading
        first, second = models["a"].backends
        assert (first.closed, second.closed) == (True, False)
        status = models.registry.status("a")
        assert (status.state, status.unload_reason) == (State.READY, None)
        assert status.unloads == {"asked to": 1}


async def test_no_request_fails_however_often_a_model_is_unloaded(fleet: Callable[..., Any]) -> None:
    """Unloaded again and again under load, by several at once: every request is answered."""
    async with fleet("a") as models:
        done = asyncio.Event()

        async def ask() -> int:
            answered = 0
            while not done.is_set():
                assert len(await models.embed("a")) == 1
                answered += 1
            return answered

        async def unload() -> None:
            for _ in range(8):
                more = len(models["a"].backends) + 1
                await models.registry.unload("a")
                await until(lambda more=more: len(models["a"].backends) >= more)

        asking = [asyncio.create_task(ask()) for _ in range(8)]
        await asyncio.gather(unload(), unload())
        done.set()
        answered = await asyncio.gather(*asking)
        assert min(answered) > 0
        status = models.registry.status("a")
        assert status.requests_served == sum(answered)
        assert len(models["a"].backends) >= 8
        assert models["a"].in_memory <= 1


async def test_two_unloads_at_once_are_one(fleet: Callable[..., Any]) -> None:
    """Both return when the model is gone; it is counted once."""
    async with fleet("a") as models:
        held = await models.held("a")
        unloading = [asyncio.create_task(models.registry.unload("a")) for _ in range(2)]
        await until(lambda: models.state("a") is State.UNLOADING)
        models["a"].backend.gate.set()
        await held
        assert {(await one).state for one in unloading} == {State.UNLOADED}
        assert models.unloads() == {"a": {"asked to": 1}}


async def test_unload_during_a_load_waits_for_it(fleet: Callable[..., Any]) -> None:
    """Who waited for the load is answered, then the model is unloaded."""
    async with fleet("a") as models:
        models["a"].may_load.clear()
        asked = asyncio.create_task(models.embed("a"))
        await until(models["a"].loading.is_set)
        unloading = asyncio.create_task(models.registry.unload("a"))
        await asyncio.sleep(0.01)
        models["a"].may_load.set()
        assert len(await asked) == 1
        assert (await unloading).state is State.UNLOADED
        assert models["a"].in_memory == 0


async def test_one_who_gives_up_unloading_does_not_stop_it(fleet: Callable[..., Any]) -> None:
    """A caller that is cancelled leaves the unloading, which is everybody's, as it is."""
    async with fleet("a") as models:
        held = await models.held("a")
        unloading = asyncio.create_task(models.registry.unload("a"))
        await until(lambda: models.state("a") is State.UNLOADING)
        unloading.cancel()
        await asyncio.gather(unloading, return_exceptions=True)
        models["a"].backend.gate.set()
        await held
        await until(lambda: models.state("a") is State.UNLOADED)
        assert models["a"].in_memory == 0


async def test_unloading_what_is_not_there_changes_nothing(fleet: Callable[..., Any]) -> None:
    """It is no error, and nothing is counted."""
    async with fleet("a") as models:
        assert (await models.registry.unload("a")).state is State.UNLOADED
        assert models.registry.status("a").unload_reason is None
        assert models.unloads() == {}


async def test_failed_model_that_is_unloaded_counts_as_trouble_no_more(fleet: Callable[..., Any]) -> None:
    """Its next request tries at once; until then it is unloaded on purpose."""
    async with fleet("a", preload=("a",)) as models:
        models["a"].load_error = RuntimeError("planted")
        assert not await models.registry.preload()
        assert not models.registry.status("a").is_available
        status = await models.registry.unload("a")
        assert (status.state, status.error, status.is_available) == (State.UNLOADED, None, True)
        models["a"].load_error = None
        assert len(await models.embed("a")) == 1


async def test_model_unloaded_on_purpose_is_available(fleet: Callable[..., Any]) -> None:
    """A preloaded model is not available before it was loaded, nor when it failed; unloaded on purpose it is."""
    async with fleet("a", preload=("a",)) as models:

        def is_available() -> bool:
            available: bool = models.registry.status("a").is_available
            return available

        assert not is_available()
        models["a"].may_load.clear()
        preloading = asyncio.create_task(models.registry.preload())
        await until(models["a"].loading.is_set)
        assert not is_available()
        models["a"].may_load.set()
        assert await preloading
        assert is_available()
        await models.registry.unload("a")
        assert is_available()
        models["a"].may_load.clear()
        models["a"].loading.clear()
        asked = asyncio.create_task(models.embed("a"))
        await until(models["a"].loading.is_set)
        assert is_available()
        models["a"].load_error = RuntimeError("planted")
        models["a"].may_load.set()
        with pytest.raises(ModelNotReadyError, match="planted"):
            await asked
        assert not is_available()


async def test_model_that_hangs_is_left_behind(fleet: Callable[..., Any]) -> None:
    """Once its requests are given up it is unloaded as far as others can see, and is loaded anew for the next."""
    async with fleet("a", watchdog_s=0.05, request_timeout_s=1.0) as models:
        held = await models.held("a")
        hanging = models["a"].backend
        unloading = asyncio.create_task(models.registry.unload("a"))
        with pytest.raises(DeadlineExceededError):
            await held
        assert (await unloading).state is State.UNLOADED
        assert not hanging.closed
        assert len(await models.embed("a")) == 1
        hanging.gate.set()
        await until(lambda: hanging.closed)


async def test_what_a_left_behind_model_says_is_not_said_of_the_new_one(fleet: Callable[..., Any]) -> None:
    """A model that was given up is loaded from the beginning; its state is its own."""
    async with fleet("a") as models:
        await models.embed("a")
        await models.registry.unload("a")
        await models.embed("a")
        entry = models.registry._entries["a"]
        old, tell = entry.loaded_model, models.registry._lifecycle._state_callback(entry.loaded_model)
        await models.registry.unload("a")
        await models.embed("a")
        assert entry.loaded_model is not old
        tell("failed", "the old one")
        await asyncio.sleep(0.01)
        assert models.state("a") is State.READY
        assert BREAKS  # its own breakdowns are tested with real engines in tests/serving and tests/faults
