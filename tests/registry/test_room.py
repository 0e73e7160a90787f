"""MAX_LOADED_MODELS and MODEL_MEMORY_LIMIT: who leaves for whom, and that every request is answered."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.errors import LoadError, ModelNotReadyError
from emb_model_provider.registry import State
from tests.registry.conftest import MIB, until

if TYPE_CHECKING:
    from collections.abc import Callable

ROOM = "room for another model"


async def test_least_recently_used_model_leaves(fleet: Callable[..., Any]) -> None:
    """It is the one whose last request is longest ago, not the one that was loaded first."""
    async with fleet("a", "b", "c", max_loaded_models=2) as models:
        for alias in ("a", "b", "a", "c"):
            await models.embed(alias)
        assert models.unloads() == {"b": {ROOM: 1}}
        assert models.registry.status("b").unload_reason == ROOM
        assert {alias: models[alias].in_memory for alias in "abc"} == {"a": 1, "b": 0, "c": 1}


async def test_idle_model_leaves_before_a_busy_one(fleet: Callable[..., Any]) -> None:
    """A model with requests stays while another has none, however long ago its last one ended."""
    async with fleet("a", "b", "c", max_loaded_models=2) as models:
        held = await models.held("a")
        await models.embed("b")
        await models.embed("c")
        assert models.unloads() == {"b": {ROOM: 1}}
        models["a"].backend.gate.set()
        await held


async def test_busy_model_answers_before_it_leaves(fleet: Callable[..., Any]) -> None:
    """Where all are busy, one leaves after its requests; who asks for it meanwhile is answered later."""
    async with fleet("a", "b", max_loaded_models=1) as models:
        held = await models.held("a")
        other = asyncio.create_task(models.embed("b"))
        await until(lambda: models.state("a") is State.UNLOADING)
        again = asyncio.create_task(models.embed("a"))
        await asyncio.sleep(0.01)
        assert not models["b"].loading.is_set()
        models["a"].backend.gate.set()
        assert [len(answer) for answer in await asyncio.gather(held, other, again)] == [1, 1, 1]
        assert models.most_in_memory == 1


@pytest.mark.parametrize("most", [1, 2])
async def test_every_request_is_answered_however_many_models_want_in(
    fleet: Callable[..., Any], most: int
) -> None:
    """Four models for one or two places, all asked at once and again and again: none fails, none is over the limit."""
    async with fleet(*"abcd", max_loaded_models=most) as models:

        async def ask(turn: int) -> None:
            for step in range(4):
                assert len(await models.embed("abcd"[(turn + step) % 4])) == 1

        await asyncio.gather(*(ask(turn) for turn in range(8)))
        assert models.most_in_memory <= most
        served = [status.requests_served for status in models.registry.statuses()]
        assert sum(served) == 32
        assert sum(models[alias].in_memory for alias in "abcd") <= most


async def test_model_that_is_being_loaded_counts(fleet: Callable[..., Any]) -> None:
    """A second model waits for the first one's load, and for those it was loaded for."""
    async with fleet("a", "b", max_loaded_models=1) as models:
        models["a"].may_load.clear()
        first = asyncio.create_task(models.embed("a"))
        await until(models["a"].loading.is_set)
        second = asyncio.create_task(models.embed("b"))
        await asyncio.sleep(0.01)
        assert not models["b"].loading.is_set()
        models["a"].may_load.set()
        assert len(await first) == len(await second) == 1
        assert models.most_in_memory == 1


async def test_load_that_fails_takes_no_room(fleet: Callable[..., Any]) -> None:
    """After it, and while it is tried, others come in as if it were not there."""
    async with fleet("a", "b", max_loaded_models=1) as models:
        models["a"].load_error = RuntimeError("planted")
        with pytest.raises(LoadError):
            await models.registry.load("a")
        models["a"].fetch_error = models["a"].load_error
        await models.embed("b")
        with pytest.raises(LoadError):
            await models.registry.load("a")
        assert models.state("b") is State.READY


async def test_memory_limit_keeps_what_fits(fleet: Callable[..., Any]) -> None:
    """Models stay while all together are within the limit; the least recently used leave for one more."""
    async with fleet(*"abc", memory_limit_bytes=400 * MIB) as models:
        await models.embed("a")
        await models.embed("b")
        assert models.unloads() == {}
        models["c"].on_disk = 60 * MIB
        models["c"].memory_bytes = 300 * MIB
        await models.embed("c")
        assert models.unloads() == {"a": {ROOM: 1}, "b": {ROOM: 1}}


async def test_model_larger_than_was_expected_makes_others_leave_afterwards(
    fleet: Callable[..., Any],
) -> None:
    """What it takes is known when it is loaded; it stays, the least recently used leaves, and next time it is known."""
    async with fleet(*"ab", memory_limit_bytes=500 * MIB) as models:
        await models.embed("a")
        models["b"].memory_bytes = 400 * MIB
        await models.embed("b")
        await until(lambda: models.unloads() == {"a": {ROOM: 1}})
        await models.embed("a")
        assert models.state("b") is State.UNLOADED
        models.most_in_memory = 0
        await models.embed("b")
        assert models.most_in_memory == 1


@pytest.mark.parametrize("on_disk", [1000 * MIB, 20 * MIB])
async def test_model_that_cannot_fit_fails_and_leaves_the_others(
    fleet: Callable[..., Any], on_disk: int
) -> None:
    """The refusal has both numbers and the setting, whether its size was known before or only when it was loaded."""
    async with fleet(*"ab", memory_limit_bytes=400 * MIB) as models:
        await models.embed("a")
        models["b"].on_disk = on_disk
        models["b"].memory_bytes = 1000 * MIB
        with pytest.raises(
            ModelNotReadyError, match=r"needs 1,000 MiB .* 400 MiB\. Set EMB_PROVIDER_MODEL_MEMORY_LIMIT"
        ):
            await models.embed("b")
        assert models.state("b") is State.FAILED
        assert models["b"].in_memory == 0
        assert models.unloads() == {}
        assert len(await models.embed("a")) == 1


async def test_model_that_hangs_does_not_keep_others_out_for_ever(fleet: Callable[..., Any]) -> None:
    """Once its own requests are given up, it makes room like any other."""
    async with fleet(*"ab", max_loaded_models=1, watchdog_s=0.05, request_timeout_s=1.0) as models:
        held = await models.held("a")
        assert len(await models.embed("b")) == 1
        await asyncio.gather(held, return_exceptions=True)
        assert held.exception() is not None


async def test_load_that_does_not_end_is_told_of(
    fleet: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps its room, and others out: its own state says so, theirs say whom they wait for, and none is called ready."""
    monkeypatch.setattr("emb_model_provider.registry.model_entry._LONG_S", 0.0)
    async with fleet(*"ab", preload=("b",), max_loaded_models=1, load_wait_s=0.0) as models:
        await models.registry.load("b")
        models["a"].may_load.clear()
        with pytest.raises(ModelNotReadyError):
            await models.embed("a")
        await until(models["a"].loading.is_set)
        assert models.registry.status("b").is_available
        waiting = asyncio.create_task(models.registry.load("b"))
        await until(lambda: "`a`" in (models.registry.status("b").error or ""))
        assert "waited for room in memory" in models.registry.status("b").error
        assert not models.registry.status("b").is_available
        assert "start the service again" in models.registry.status("a").error
        with pytest.raises(
            ModelNotReadyError, match=r"still loading, waiting for room in memory \(`a` is to be"
        ):
            await models.embed("b")
        models["a"].may_load.set()
        assert (await waiting).error is None
        assert models.registry.status("b").is_available


async def test_stop_while_a_model_waits_for_room_ends_both(fleet: Callable[..., Any]) -> None:
    """Nothing waits for anything any more, and nothing stays in memory."""
    async with fleet(*"ab", max_loaded_models=1) as models:
        held = await models.held("a")
        other = asyncio.create_task(models.embed("b"))
        await until(lambda: models.state("a") is State.UNLOADING)
        stopping = asyncio.create_task(models.registry.stop())
        await asyncio.sleep(0.01)
        models["a"].backend.gate.set()
        await stopping
        assert len(await held) == 1
        with pytest.raises(ModelNotReadyError, match="shutting down"):
            await other
        assert [models[alias].in_memory for alias in "ab"] == [0, 0]
        assert [models.state(alias) for alias in "ab"] == [State.UNLOADED] * 2
