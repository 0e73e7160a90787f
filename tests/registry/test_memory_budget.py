"""MAX_LOADED_MODELS and MODEL_MEMORY_LIMIT: the order of evictions, and that every request is answered."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.errors import LoadError, ModelNotReadyError
from emb_model_provider.registry import State
from tests.registry.helpers import MIB
from tests.serving.helpers import until

if TYPE_CHECKING:
    from collections.abc import Callable

ROOM = "room for another model"


async def test_least_recently_used_model_is_evicted(fleet: Callable[..., Any]) -> None:
    """The time of the last request counts, not that of the load."""
    async with fleet("a", "b", "c", max_loaded_models=2) as models:
        for alias in ("a", "b", "a", "c"):
            await models.embed(alias)
        assert models.unloads() == {"b": {ROOM: 1}}
        assert models.registry.status("b").unload_reason == ROOM
        assert {alias: models[alias].in_memory for alias in "abc"} == {"a": 1, "b": 0, "c": 1}


async def test_idle_model_is_evicted_before_a_busy_one(fleet: Callable[..., Any]) -> None:
    """A model with requests is kept if another has none, whichever was used last."""
    async with fleet("a", "b", "c", max_loaded_models=2) as models:
        holding = await models.hold("a")
        await models.embed("b")
        await models.embed("c")
        assert models.unloads() == {"b": {ROOM: 1}}
        models["a"].backend.gate.set()
        await holding


async def test_busy_model_is_evicted_after_its_requests(fleet: Callable[..., Any]) -> None:
    """If all models are busy, one is evicted after its requests. Requests that arrive meanwhile are answered later."""
    async with fleet("a", "b", max_loaded_models=1) as models:
        holding = await models.hold("a")
        other = asyncio.create_task(models.embed("b"))
        await until(lambda: models.state("a") is State.UNLOADING)
        again = asyncio.create_task(models.embed("a"))
        await asyncio.sleep(0.01)
        assert not models["b"].is_loading.is_set()
        models["a"].backend.gate.set()
        assert [len(answer) for answer in await asyncio.gather(holding, other, again)] == [1, 1, 1]
        assert models.max_in_memory == 1


@pytest.mark.parametrize("limit", [1, 2])
async def test_every_request_is_answered_if_models_evict_each_other(fleet: Callable[..., Any], limit: int) -> None:
    """Concurrent requests for four models with a limit of one or two: none fails, and the limit holds."""
    async with fleet(*"abcd", max_loaded_models=limit) as models:

        async def request(turn: int) -> None:
            for step in range(4):
                assert len(await models.embed("abcd"[(turn + step) % 4])) == 1

        await asyncio.gather(*(request(turn) for turn in range(8)))
        assert models.max_in_memory <= limit
        served = [status.requests_served for status in models.registry.statuses()]
        assert sum(served) == 32
        assert sum(models[alias].in_memory for alias in "abcd") <= limit


async def test_loading_model_counts(fleet: Callable[..., Any]) -> None:
    """A second model waits for the load of the first one and for the requests that wait for it."""
    async with fleet("a", "b", max_loaded_models=1) as models:
        models["a"].can_load.clear()
        first = asyncio.create_task(models.embed("a"))
        await until(models["a"].is_loading.is_set)
        second = asyncio.create_task(models.embed("b"))
        await asyncio.sleep(0.01)
        assert not models["b"].is_loading.is_set()
        models["a"].can_load.set()
        assert len(await first) == len(await second) == 1
        assert models.max_in_memory == 1


async def test_failed_load_takes_no_memory(fleet: Callable[..., Any]) -> None:
    """Neither during the download nor after the failure is another model evicted or kept waiting for it."""
    async with fleet("a", "b", max_loaded_models=1) as models:
        models["a"].load_error = RuntimeError("planted")
        with pytest.raises(LoadError):
            await models.registry.load("a")
        models["a"].fetch_error = models["a"].load_error
        await models.embed("b")
        with pytest.raises(LoadError):
            await models.registry.load("a")
        assert models.state("b") is State.READY


async def test_memory_limit_evicts_only_if_exceeded(fleet: Callable[..., Any]) -> None:
    """Models are kept as long as all together are within the limit. The least recently used are evicted first."""
    async with fleet(*"abc", model_memory_limit=400 * MIB) as models:
        await models.embed("a")
        await models.embed("b")
        assert models.unloads() == {}
        models["c"].size_on_disk = 60 * MIB
        models["c"].memory_bytes = 300 * MIB
        await models.embed("c")
        assert models.unloads() == {"a": {ROOM: 1}, "b": {ROOM: 1}}


async def test_model_larger_than_expected_evicts_others_after_its_load(fleet: Callable[..., Any]) -> None:
    """Its memory is measured when it is loaded, and the measured value is used for the next load."""
    async with fleet(*"ab", model_memory_limit=500 * MIB) as models:
        await models.embed("a")
        models["b"].memory_bytes = 400 * MIB
        await models.embed("b")
        await until(lambda: models.unloads() == {"a": {ROOM: 1}})
        await models.embed("a")
        assert models.state("b") is State.UNLOADED
        models.max_in_memory = 0
        await models.embed("b")
        assert models.max_in_memory == 1


@pytest.mark.parametrize("size_on_disk", [1000 * MIB, 20 * MIB])
async def test_model_larger_than_the_limit_fails(fleet: Callable[..., Any], size_on_disk: int) -> None:
    """The error names both sizes and the setting, both before and after the load. No other model is evicted."""
    async with fleet(*"ab", model_memory_limit=400 * MIB) as models:
        await models.embed("a")
        models["b"].size_on_disk = size_on_disk
        models["b"].memory_bytes = 1000 * MIB
        with pytest.raises(
            ModelNotReadyError, match=r"needs 1\.0 GB of memory, .* 419 MB\. Increase EMB_PROVIDER_MODEL_MEMORY_LIMIT"
        ):
            await models.embed("b")
        assert models.state("b") is State.FAILED
        assert models["b"].in_memory == 0
        assert models.unloads() == {}
        assert len(await models.embed("a")) == 1


async def test_model_that_hangs_is_evicted(fleet: Callable[..., Any]) -> None:
    """After the deadline of its requests it is evicted like any other model."""
    async with fleet(*"ab", max_loaded_models=1, watchdog_s=0.05, request_timeout_s=1.0, load_wait_s=60.0) as models:
        holding = await models.hold("a")
        assert len(await models.embed("b")) == 1
        await asyncio.gather(holding, return_exceptions=True)
        assert holding.exception() is not None


async def test_load_that_does_not_end_is_reported(fleet: Callable[..., Any]) -> None:
    """Its status says so, and the status of a model that waits for its memory names it. Neither is available."""
    async with fleet(*"ab", preload=("b",), max_loaded_models=1, load_wait_s=0.0, slow_load_s=0.0) as models:
        await models.registry.load("b")
        models["a"].can_load.clear()
        with pytest.raises(ModelNotReadyError):
            await models.embed("a")
        await until(models["a"].is_loading.is_set)
        assert models.registry.status("b").is_available
        waiting = asyncio.create_task(models.registry.load("b"))
        await until(lambda: "`a`" in (models.registry.status("b").error or ""))
        assert "waiting for memory" in models.registry.status("b").error
        assert not models.registry.status("b").is_available
        assert "restart the service" in models.registry.status("a").error
        with pytest.raises(ModelNotReadyError, match=r"still loading, waiting for memory \(`a` is unloaded first"):
            await models.embed("b")
        models["a"].can_load.set()
        assert (await waiting).error is None
        assert models.registry.status("b").is_available


async def test_stop_during_an_eviction(fleet: Callable[..., Any]) -> None:
    """Requests of the evicted model are answered, those of the other model fail, and both are unloaded."""
    async with fleet(*"ab", max_loaded_models=1) as models:
        holding = await models.hold("a")
        other = asyncio.create_task(models.embed("b"))
        await until(lambda: models.state("a") is State.UNLOADING)
        stopping = asyncio.create_task(models.registry.stop())
        await asyncio.sleep(0.01)
        models["a"].backend.gate.set()
        await stopping
        assert len(await holding) == 1
        with pytest.raises(ModelNotReadyError, match="shutting down"):
            await other
        assert [models[alias].in_memory for alias in "ab"] == [0, 0]
        assert [models.state(alias) for alias in "ab"] == [State.UNLOADED] * 2
