"""Unloading models: requests are answered, and states are correct."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.errors import DeadlineExceededError, LoadError, ModelNotReadyError
from emb_model_provider.registry import State
from tests.service import no_more_threads
from tests.serving.helpers import until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


async def test_model_is_unloaded_after_its_requests(fleet: Callable[..., Any]) -> None:
    """Requests in progress are answered by the old engine, requests that arrive meanwhile by a new one."""
    async with fleet("a") as models:
        holding = await models.hold("a")
        unloading = asyncio.create_task(models.registry.unload("a"))
        await until(lambda: models.state("a") is State.UNLOADING)
        late = asyncio.create_task(models.embed("a"))
        await asyncio.sleep(0.01)
        assert not models["a"].backend.closed
        assert not late.done()
        models["a"].backend.gate.set()
        assert len(await holding) == 1
        assert len(await late) == 1
        await unloading
        first, second = models["a"].backends
        assert (first.closed, second.closed) == (True, False)
        status = models.registry.status("a")
        assert (status.state, status.unload_reason) == (State.READY, None)
        assert status.unloads == {"asked to": 1}


async def test_model_is_unloaded_without_another_thread(fleet: Callable[..., Any]) -> None:
    """At the limit of threads, its memory is freed, too, and its next request loads it again."""
    async with fleet("a") as models:
        await models.embed("a")
        with no_more_threads():
            await models.registry.unload("a")
        await until(lambda: models["a"].backends[0].closed)
        assert models.state("a") is State.UNLOADED
        assert len(await models.embed("a")) == 1


async def test_no_request_fails_during_unloads(fleet: Callable[..., Any]) -> None:
    """A model is unloaded repeatedly under load by two callers, and every request is answered."""
    async with fleet("a") as models:
        done = asyncio.Event()

        async def send_requests() -> int:
            answered = 0
            while not done.is_set():
                assert len(await models.embed("a")) == 1
                answered += 1
            return answered

        async def unload() -> None:
            for _ in range(8):
                loads = len(models["a"].backends)
                await models.registry.unload("a")
                await until(lambda loads=loads: len(models["a"].backends) > loads)

        requests = [asyncio.create_task(send_requests()) for _ in range(8)]
        await asyncio.gather(unload(), unload())
        done.set()
        answered = await asyncio.gather(*requests)
        assert min(answered) > 0
        status = models.registry.status("a")
        assert status.requests_served == sum(answered)
        assert len(models["a"].backends) >= 8
        assert models["a"].in_memory <= 1


async def test_concurrent_unloads_count_once(fleet: Callable[..., Any]) -> None:
    """Both callers return when the model is unloaded."""
    async with fleet("a") as models:
        holding = await models.hold("a")
        unloading = [asyncio.create_task(models.registry.unload("a")) for _ in range(2)]
        await until(lambda: models.state("a") is State.UNLOADING)
        models["a"].backend.gate.set()
        await holding
        assert {(await task).state for task in unloading} == {State.UNLOADED}
        assert models.unloads() == {"a": {"asked to": 1}}


async def test_unload_during_a_load_waits_for_it(fleet: Callable[..., Any]) -> None:
    """Requests that wait for the load are answered. Then the model is unloaded."""
    async with fleet("a") as models:
        models["a"].can_load.clear()
        request = asyncio.create_task(models.embed("a"))
        await until(models["a"].is_loading.is_set)
        unloading = asyncio.create_task(models.registry.unload("a"))
        await asyncio.sleep(0.01)
        models["a"].can_load.set()
        assert len(await request) == 1
        assert (await unloading).state is State.UNLOADED
        assert models["a"].in_memory == 0


async def test_cancelled_caller_does_not_cancel_the_unload(fleet: Callable[..., Any]) -> None:
    """The unload continues, because other callers may wait for it."""
    async with fleet("a") as models:
        holding = await models.hold("a")
        unloading = asyncio.create_task(models.registry.unload("a"))
        await until(lambda: models.state("a") is State.UNLOADING)
        unloading.cancel()
        await asyncio.gather(unloading, return_exceptions=True)
        models["a"].backend.gate.set()
        await holding
        await until(lambda: models.state("a") is State.UNLOADED)
        assert models["a"].in_memory == 0


async def test_unloading_a_model_that_is_not_loaded_does_nothing(fleet: Callable[..., Any]) -> None:
    """It is not an error, and is not counted."""
    async with fleet("a") as models:
        assert (await models.registry.unload("a")).state is State.UNLOADED
        assert models.registry.status("a").unload_reason is None
        assert models.unloads() == {}


async def test_unload_resets_a_failed_model(fleet: Callable[..., Any]) -> None:
    """It counts as available, and its next request loads it without a delay."""
    async with fleet("a", preload=("a",)) as models:
        models["a"].load_error = RuntimeError("planted")
        assert not await models.registry.preload()
        assert not models.registry.status("a").is_available
        status = await models.registry.unload("a")
        assert (status.state, status.error, status.is_available) == (State.UNLOADED, None, True)
        models["a"].load_error = None
        assert len(await models.embed("a")) == 1


async def test_a_directory_that_hides_a_repository_is_named(
    fleet: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error says how to get the model of the hub."""
    (tmp_path / "owner/model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    async with fleet("owner/model", "a", preload=("owner/model", "a")) as models:
        for name in ("owner/model", "a"):
            models[name].load_error = LoadError("it is another kind of model.")
        await models.registry.preload()
        assert "EMB_PROVIDER_MODEL_SOURCE" in models.registry.status("owner/model").error
        assert models.registry.status("a").error == "it is another kind of model."


async def test_unloaded_model_is_available(fleet: Callable[..., Any]) -> None:
    """A model is not available before its first load and after a failure, but it is after an unload."""
    async with fleet("a", preload=("a",)) as models:

        def is_available() -> bool:
            available: bool = models.registry.status("a").is_available
            return available

        assert not is_available()
        models["a"].can_load.clear()
        preloading = asyncio.create_task(models.registry.preload())
        await until(models["a"].is_loading.is_set)
        assert not is_available()
        models["a"].can_load.set()
        assert await preloading
        assert is_available()
        await models.registry.unload("a")
        assert is_available()
        models["a"].can_load.clear()
        models["a"].is_loading.clear()
        request = asyncio.create_task(models.embed("a"))
        await until(models["a"].is_loading.is_set)
        assert is_available()
        models["a"].load_error = RuntimeError("planted")
        models["a"].can_load.set()
        with pytest.raises(ModelNotReadyError, match="planted"):
            await request
        assert not is_available()


async def test_model_that_hangs_is_unloaded(fleet: Callable[..., Any]) -> None:
    """After the deadline of its requests it counts as unloaded, and the next request loads it again."""
    async with fleet("a", watchdog_s=0.05, request_timeout_s=1.0) as models:
        holding = await models.hold("a")
        hanging = models["a"].backend
        unloading = asyncio.create_task(models.registry.unload("a"))
        with pytest.raises(DeadlineExceededError):
            await holding
        assert (await unloading).state is State.UNLOADED
        assert not hanging.closed
        assert len(await models.embed("a")) == 1
        hanging.gate.set()
        await until(lambda: hanging.closed)


async def test_crash_of_an_unloaded_model_does_not_change_the_new_one(fleet: Callable[..., Any]) -> None:
    """A model that hung is loaded again. A later crash of the hung one is not reported as a restart of the new one."""
    async with fleet("a", watchdog_s=0.05, request_timeout_s=1.0) as models:
        holding = await models.hold("a")
        hung = models["a"].backend
        await asyncio.gather(holding, models.registry.unload("a"), return_exceptions=True)
        await models.embed("a")
        hung.broken = True
        hung.gate.set()
        # The thread of the crashed model loads it again, finds that it is to stop, and closes it.
        await until(lambda: hung.closed and len(models["a"].backends) == 3 and models["a"].in_memory == 1)
        await asyncio.sleep(0.01)
        status = models.registry.status("a")
        assert (status.state, status.restarts, status.error) == (State.READY, 0, None)
