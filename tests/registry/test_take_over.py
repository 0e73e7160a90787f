"""Torch serves a model while it is compiled, and the compiled form takes over."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from emb_model_provider.errors import LoadError, ModelNotReadyError
from emb_model_provider.fidelity.compare import AccuracyError
from emb_model_provider.registry import State
from tests.registry.helpers import MIB
from tests.serving.helpers import TIMEOUT_S, until

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.registry.helpers import Fleet

GIB = 2**30


async def until_compiled(models: Fleet, alias: str = "a") -> None:
    """End the compilation, and wait until the compiled form has taken over and torch has ended."""
    models[alias].can_compile.set()
    await until(lambda: models.registry.status(alias).progress is None and models.state(alias) is State.READY)
    await until(lambda: all(backend.closed for backend in models[alias].interims))


async def test_compiled_model_takes_over_without_a_failed_request(fleet: Callable[..., Any]) -> None:
    """Requests in progress end with torch, later ones use the compiled form, and no request waits for the compiler."""
    async with fleet("a", torch_while_compiling=True) as models:
        models["a"].can_compile.clear()
        vectors = await models.embed("a")
        (interim,) = models["a"].interims
        assert (models.state("a"), models["a"].backends) == (State.READY, [])
        await until(lambda: models.registry.status("a").progress is not None)
        assert models.registry.status("a").progress_text == "step 3 of 6 (export), about 20 s left"
        interim.gate.clear()
        interim.entered.clear()
        slow = asyncio.create_task(models.embed("a"))
        await until(interim.entered.is_set)
        models["a"].can_compile.set()
        await until(lambda: bool(models["a"].backends))
        await until(lambda: models.registry.status("a").progress is None)
        assert np.array_equal(await models.embed("a"), vectors)
        assert len(models["a"].backend.batches) == 2  # one of them is the test at its load
        assert not interim.closed
        interim.gate.set()
        assert np.array_equal(await slow, vectors)
        await until(lambda: interim.closed)
        status = models.registry.status("a")
        assert (status.state, status.error, status.requests_served) == (State.READY, None, 3)
        assert [lock.is_released for lock in models["a"].locks] == [False]


async def test_continuous_requests_during_the_change(fleet: Callable[..., Any]) -> None:
    async with fleet("a", torch_while_compiling=True) as models:
        models["a"].can_compile.clear()
        expected = await models.embed("a")
        asked = 0
        is_over = False

        async def ask() -> None:
            nonlocal asked
            while not is_over:
                assert np.array_equal(await models.embed("a"), expected)
                asked += 1

        clients = [asyncio.create_task(ask()) for _ in range(4)]
        await until(lambda: asked > 20)
        await until_compiled(models)
        before = asked
        await until(lambda: asked > before + 20)
        is_over = True
        await asyncio.gather(*clients)


async def test_compiler_that_is_faster_than_torch(fleet: Callable[..., Any]) -> None:
    """Torch ends without a request."""
    async with fleet("a", torch_while_compiling=True) as models:
        model = models["a"]
        model.can_compile.clear()
        model.can_start_interim.clear()
        loading = asyncio.create_task(models.embed("a"))
        await until(lambda: models.state("a") is State.COMPILING)
        model.can_compile.set()
        assert len(await loading) == 1
        assert [backend.closed for backend in model.interims] in ([], [True])
        assert model.in_memory == 1


async def test_model_that_torch_cannot_serve_waits_for_the_compiler(fleet: Callable[..., Any]) -> None:
    """The error of a request that has waited says how far the compiler is, and when to try again."""
    async with fleet("a", torch_while_compiling=True, load_wait_s=0.5) as models:
        models["a"].can_compile.clear()
        models["a"].interim_error = LoadError("no memory")
        with pytest.raises(
            ModelNotReadyError, match=r"still compiling: step 3 of 6 \(export\), about 20 s left"
        ) as caught:
            await models.embed("a")
        assert caught.value.retry_after_s == 20
        assert models.state("a") is State.COMPILING
        models["a"].can_compile.set()
        await until(lambda: models.state("a") is State.READY)
        assert len(await models.embed("a")) == 1


async def test_torch_process_that_dies_again_and_again(fleet: Callable[..., Any]) -> None:
    """Then requests wait for the compiler. It is not tried a third time."""
    async with fleet("a", torch_while_compiling=True) as models:
        models["a"].can_compile.clear()
        await models.embed("a")
        waiting = []
        for count in (1, 2):
            interim = models["a"].interims[-1]
            interim.broken = True
            waiting.append(asyncio.create_task(models.embed("a")))
            await until(lambda count=count: len(models["a"].interims) > count or models.state("a") is State.COMPILING)
        await until(lambda: models.state("a") is State.COMPILING)
        later = asyncio.create_task(models.embed("a"))
        models["a"].can_compile.set()
        assert len(await later) == 1
        assert len(models["a"].interims) == 2
        await asyncio.gather(*waiting, return_exceptions=True)


@pytest.mark.parametrize("limit", [1000 * MIB, 950 * MIB])
async def test_both_count_as_memory(limit: int, fleet: Callable[..., Any]) -> None:
    """If they do not fit beside each other, requests wait while the compiled form is loaded."""
    async with fleet("a", torch_while_compiling=True, model_memory_limit=limit) as models:
        models["a"].size_on_disk = MIB
        models["a"].memory_bytes = 60 * MIB
        models["a"].can_compile.clear()
        await models.embed("a")
        assert models.registry.status("a").memory_bytes == 900 * MIB
        models["a"].can_load.clear()
        models["a"].can_compile.set()
        await until(models["a"].is_loading.is_set)
        was_closed = models["a"].interims[0].closed
        request = asyncio.create_task(models.embed("a"))
        models["a"].can_load.set()
        assert len(await request) == 1
        await until_compiled(models)
        assert was_closed is (limit == 950 * MIB)
        assert models.registry.status("a").memory_bytes == 60 * MIB


async def test_other_models_are_not_evicted_for_torch(fleet: Callable[..., Any]) -> None:
    """Without room for torch, requests wait for the compiler. A model and its replacement count as one model."""
    async with fleet("a", "b", torch_while_compiling=True, model_memory_limit=GIB) as models:
        models["b"].memory_bytes = GIB // 2
        await models.embed("b")
        models["a"].can_compile.clear()
        loading = asyncio.create_task(models.embed("a"))
        await until(lambda: models.state("a") is State.COMPILING)
        models["a"].can_compile.set()
        assert len(await loading) == 1
        assert (models["a"].interims, models.unloads()) == ([], {})
    async with fleet("a", "b", torch_while_compiling=True, max_loaded_models=1) as models:
        await models.embed("b")
        models["a"].can_compile.clear()
        loading = asyncio.create_task(models.embed("a"))
        await until(lambda: models.state("a") is State.COMPILING)
        assert models.state("b") is State.READY
        models["a"].can_compile.set()
        assert len(await loading) == 1
        assert models["a"].interims == []
    async with fleet("a", torch_while_compiling=True, max_loaded_models=1) as models:
        models["a"].can_compile.clear()
        await models.embed("a")
        await until_compiled(models)
        assert models.unloads() == {}


async def test_model_that_is_evicted_while_torch_loads_it(
    fleet: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Its compiled form needs memory again, and does not wait for the model that waits for its end."""
    caplog.set_level("INFO")
    async with fleet("a", "b", "c", torch_while_compiling=True, max_loaded_models=1) as models:
        models["a"].can_compile.clear()
        models["a"].can_start_interim.clear()
        first = asyncio.create_task(models.embed("a"))
        await until(lambda: models.state("a") is State.COMPILING)
        others = [asyncio.create_task(models.embed("b"))]
        await until(lambda: "evicting model a to make room for b" in caplog.text)
        others.append(asyncio.create_task(models.embed("c")))
        models["a"].can_compile.set()
        vectors = await asyncio.wait_for(asyncio.gather(first, *others, models.embed("a")), TIMEOUT_S)
        assert [len(each) for each in vectors] == [1, 1, 1, 1]
        assert models.max_in_memory == 1


async def test_torch_serves_on_if_the_model_cannot_be_compiled(fleet: Callable[..., Any]) -> None:
    """In its own process, and with the reason. A precision that is not accurate enough is not served."""
    async with fleet("a", torch_while_compiling=True) as models:
        models["a"].can_compile.clear()
        await models.embed("a")
        models["a"].compile_error = LoadError("the compiler was killed")
        models["a"].can_compile.set()
        await until(lambda: models.registry.status("a").error is not None)
        status = models.registry.status("a")
        assert (status.state, status.is_available, status.progress) == (State.READY, True, None)
        assert "the compiler was killed" in (status.error or "")
        assert len(await models.embed("a")) == 1
        assert not models["a"].interims[0].closed
    async with fleet("a", torch_while_compiling=True) as models:
        models["a"].can_compile.clear()
        await models.embed("a")
        models["a"].compile_error = AccuracyError("below its floor", reason="below its floor")
        models["a"].can_compile.set()
        await until(lambda: models.state("a") is State.FAILED)
        with pytest.raises(ModelNotReadyError, match="below its floor"):
            await models.embed("a")
        await until(lambda: models["a"].interims[0].closed)


async def test_model_that_is_unloaded_while_it_is_compiled(fleet: Callable[..., Any]) -> None:
    """Torch ends at once. The compiled form is not loaded before the next request."""
    async with fleet("a", torch_while_compiling=True) as models:
        models["a"].can_compile.clear()
        await models.embed("a")
        await models.registry.unload("a")
        assert models["a"].interims[0].closed
        models["a"].can_compile.set()
        await asyncio.sleep(0.05)
        assert (models.state("a"), models["a"].backends) == (State.UNLOADED, [])
        assert len(await models.embed("a")) == 1
        assert len(models["a"].interims) == 1


async def test_service_that_stops_while_it_compiles(fleet: Callable[..., Any]) -> None:
    async with fleet("a", torch_while_compiling=True) as models:
        models["a"].can_compile.clear()
        await models.embed("a")
        await models.registry.stop()
        assert models["a"].interims[0].closed
