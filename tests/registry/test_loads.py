"""Models come into memory when they are wanted, and whoever wants them hears what becomes of that."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.errors import (
    HubUnavailableError,
    LoadError,
    ModelInUseError,
    ModelNotFoundError,
    ModelNotReadyError,
    NotAllowedError,
)
from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.registry import State
from tests.registry.conftest import MIB, FakeModel, until

if TYPE_CHECKING:
    from collections.abc import Callable


async def test_request_waits_no_longer_than_it_may_and_loading_goes_on(fleet: Callable[..., Any]) -> None:
    """After LOAD_WAIT_S a request hears when to come back; the load it began is there for the next one."""
    async with fleet("a", load_wait_s=0.0) as models:
        models["a"].may_load.clear()
        with pytest.raises(ModelNotReadyError, match="ask again later") as caught:
            await models.embed("a")
        assert caught.value.retry_after_s > 0
        await until(models["a"].loading.is_set)
        assert models.state("a") is State.LOADING
        models["a"].may_load.set()
        await until(lambda: models.state("a") is State.READY)
        assert len(await models.embed("a")) == 1
        assert len(models["a"].backends) == 1


async def test_explicit_load_tells_the_reason_itself_and_tries_at_once(fleet: Callable[..., Any]) -> None:
    """`load` raises the hub's own error, and a model that failed is tried again without a pause."""
    async with fleet("a") as models:
        models["a"].fetch_error = HubUnavailableError("the hub is down")
        with pytest.raises(HubUnavailableError, match="the hub is down"):
            await models.registry.load("a")
        with pytest.raises(ModelNotReadyError, match="the hub is down"):
            await models.embed("a")
        models["a"].fetch_error = None
        status = await models.registry.load("a")
        assert (status.state, status.error) == (State.READY, None)
        assert status.loaded_at is not None
        assert status.memory_bytes == 200 * MIB
        assert len(await models.embed("a")) == 1


class PanicError(BaseException):
    """As what libraries written in Rust raise where they panic: no Exception."""


@pytest.mark.parametrize("kind", [ZeroDivisionError, PanicError])
@pytest.mark.parametrize("where", ["fetch_error", "load_error"])
async def test_load_that_fails_in_the_models_own_code_is_told_as_a_load_error(
    fleet: Callable[..., Any], where: str, kind: type[BaseException]
) -> None:
    """Whatever a model's code raises, the registry says in one line, holds nothing any more, and may try again."""
    async with fleet("a", max_loaded_models=1) as models:
        setattr(models["a"], where, kind("planted\nsecond line"))
        with pytest.raises(LoadError, match=rf"{kind.__name__}: planted$"):
            await models.registry.load("a")
        status = models.registry.status("a")
        assert (status.state, status.error) == (State.FAILED, f"{kind.__name__}: planted")
        assert all(hold.released for hold in models["a"].holds)
        setattr(models["a"], where, None)
        assert (await models.registry.load("a")).state is State.READY


async def test_snapshot_is_held_as_long_as_the_model_is_in_memory(fleet: Callable[..., Any]) -> None:
    """Nobody may remove files that a model is loaded from anew when it breaks down."""
    async with fleet("a") as models:
        await models.embed("a")
        (hold,) = models["a"].holds
        assert not hold.released
        await models.registry.unload("a")
        assert hold.released


async def test_added_model_is_served_under_all_its_names_until_it_is_forgotten(
    fleet: Callable[..., Any],
) -> None:
    """A model that is added is one like any other; forgotten, no name means it any more."""
    async with fleet("a", "b") as models:
        await models.registry.remove(models.registry.add(ModelSpec(alias="b2", name="b2")))
        registry = models.registry
        models.models["new"] = models["b"]
        spec = ModelSpec(alias="new", name="acme/new-one")
        assert registry.add(spec) == registry.add(spec) == "new"
        assert not registry.status("new-one").configured
        assert len(await models.embed("acme/new-one")) == 1
        with pytest.raises(ModelInUseError, match="taken"):
            registry.add(ModelSpec(alias="new", name="acme/another"))
        await registry.remove("new")
        for name in ("new", "acme/new-one", "new-one"):
            with pytest.raises(ModelNotFoundError):
                registry.lease(name)
        assert [status.spec.alias for status in registry.statuses()] == ["a", "b"]
        assert models["b"].in_memory == 0


async def test_forgetting_means_one_model_only(fleet: Callable[..., Any]) -> None:
    """Who forgets a model a second time, while the first is under way, hears so; its name may be another's by then."""
    async with fleet("a") as models:
        registry = models.registry
        for alias, name in (("new", "acme/first"), ("acme/new", "acme/new")):
            models.models[alias] = FakeModel()
            registry.add(ModelSpec(alias=alias, name=name))
        held = await models.held("new")
        forgetting = asyncio.create_task(registry.remove("new"))
        await until(lambda: registry.alias_of("new") == "acme/new")
        with pytest.raises(ModelNotFoundError):
            await registry.remove("new")
        models["new"].backend.gate.set()
        await held
        assert (await forgetting).state is State.UNLOADED
        assert [status.spec.alias for status in registry.statuses()] == ["a", "acme/new"]


async def test_model_of_the_settings_is_not_forgotten(fleet: Callable[..., Any]) -> None:
    """What the settings name stays served: the refusal says what to do instead."""
    async with fleet("a") as models:
        with pytest.raises(NotAllowedError, match="MODEL_MAPPING"):
            await models.registry.remove("a")
        assert len(await models.embed("a")) == 1


async def test_model_forgotten_while_it_is_loaded_answers_those_who_wait_and_is_gone(
    fleet: Callable[..., Any],
) -> None:
    """Requests that wait for the load are answered; then nothing of the model is in memory."""
    async with fleet("a", "new") as models:
        registry = models.registry
        del registry._entries["new"]
        registry.add(ModelSpec(alias="new", name="new"))
        models["new"].may_load.clear()
        asked = asyncio.create_task(models.embed("new"))
        await until(models["new"].loading.is_set)
        forgetting = asyncio.create_task(registry.remove("new"))
        await asyncio.sleep(0)
        with pytest.raises(ModelNotFoundError):
            registry.lease("new")
        models["new"].may_load.set()
        assert len(await asked) == 1
        await forgetting
        assert models["new"].in_memory == 0


async def test_stop_during_a_load_leaves_nothing_in_memory(fleet: Callable[..., Any]) -> None:
    """Who waits is told; the thread that loads frees the model as soon as it has it."""
    async with fleet("a") as models:
        models["a"].may_load.clear()
        asked = asyncio.create_task(models.embed("a"))
        await until(models["a"].loading.is_set)
        await models.registry.stop()
        with pytest.raises(ModelNotReadyError, match="shutting down"):
            await asked
        assert models["a"].holds[0].released
        models["a"].may_load.set()
        await until(lambda: models["a"].backends and not models["a"].in_memory)
