"""Names, leases, loading, adding and removing models."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import pytest

from emb_model_provider.errors import (
    HubUnavailableError,
    LoadError,
    ModelInUseError,
    ModelNotFoundError,
    ModelNotReadyError,
    NotAllowedError,
)
from emb_model_provider.model_resolver import ResolvedName
from emb_model_provider.model_spec import ModelSpec, RequestDefaults
from emb_model_provider.registry import Registry, RegistryConfig, State
from emb_model_provider.settings import ServedModels
from tests.registry.helpers import MIB, FakeModel, Fleet
from tests.serving.helpers import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.management.manager import ModelManager


async def test_load_continues_after_a_request_stopped_waiting(fleet: Callable[..., Any]) -> None:
    """After LOAD_WAIT_S a request fails with a Retry-After. A later request uses the load that it started."""
    async with fleet("a", load_wait_s=0.0) as models:
        models["a"].can_load.clear()
        with pytest.raises(ModelNotReadyError, match="Try again later") as caught:
            await models.embed("a")
        assert caught.value.retry_after_s > 0
        await until(models["a"].is_loading.is_set)
        assert models.state("a") is State.LOADING
        models["a"].can_load.set()
        await until(lambda: models.state("a") is State.READY)
        assert len(await models.embed("a")) == 1
        assert len(models["a"].backends) == 1


async def test_explicit_load_raises_the_cause_and_retries_at_once(fleet: Callable[..., Any]) -> None:
    """`load` raises the error of the hub, and loads a model that failed without a delay."""
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
    """Not an Exception, like a panic of a library written in Rust."""


@pytest.mark.parametrize("kind", [ZeroDivisionError, PanicError])
@pytest.mark.parametrize("attribute", ["fetch_error", "load_error"])
async def test_unexpected_error_of_a_load_becomes_a_load_error(
    fleet: Callable[..., Any], attribute: str, kind: type[BaseException]
) -> None:
    """The registry reports any error in one line, releases the snapshot, and can load the model again."""
    async with fleet("a", max_loaded_models=1) as models:
        setattr(models["a"], attribute, kind("planted\nsecond line"))
        with pytest.raises(LoadError, match=rf"{kind.__name__}: planted$"):
            await models.registry.load("a")
        status = models.registry.status("a")
        assert (status.state, status.error) == (State.FAILED, f"{kind.__name__}: planted")
        assert all(lock.is_released for lock in models["a"].locks)
        setattr(models["a"], attribute, None)
        assert (await models.registry.load("a")).state is State.READY


async def test_snapshot_is_locked_while_the_model_is_in_memory(fleet: Callable[..., Any]) -> None:
    """Its files must stay on disk, because a crashed model is loaded from them again."""
    async with fleet("a") as models:
        await models.embed("a")
        (lock,) = models["a"].locks
        assert not lock.is_released
        await models.registry.unload("a")
        assert lock.is_released


def test_names_refer_to_aliases_ids_and_unique_last_parts() -> None:
    """An alias takes precedence over an id, and an id over a last part. Ambiguous names refer to no model."""
    names = {
        "bge-m3": "other/model",
        "a": "BAAI/bge-m3",
        "b": "x/twin",
        "c": "y/twin",
        "d": "z/shared",
        "e": "z/shared",
        "org/long-name": "org/long-name",
    }
    specs = tuple(ModelSpec(alias=alias, name=name) for alias, name in names.items())
    models = ServedModels(specs=specs, preload=())
    registry = Registry(models, cast("ModelManager", Fleet()), RegistryConfig())
    assert registry.default_alias == "bge-m3"
    assert registry.alias_of("bge-m3") == "bge-m3"
    assert registry.alias_of("BAAI/bge-m3") == "a"
    assert registry.alias_of("model") == "bge-m3"
    assert registry.alias_of("long-name") == "org/long-name"
    assert registry.alias_of("y/twin") == "c"
    assert registry.alias_of("z/shared") == registry.alias_of("shared") == "d"
    for unknown in ("twin", "nothing", "", "BGE-M3", "bge-m3:latest", "bge-m3-query"):
        with pytest.raises(ModelNotFoundError, match="does not exist"):
            registry.alias_of(unknown)


def test_default_model_answers_unknown_names_if_the_settings_say_so() -> None:
    """Names of other models keep their meaning. Management still requires an exact name."""
    specs = (ModelSpec(alias="a", name="acme/first"), ModelSpec(alias="b", name="acme/second"))
    models = ServedModels(specs=specs, preload=(), answers_unknown=True)
    registry = Registry(models, cast("ModelManager", Fleet()), RegistryConfig())
    assert [registry.resolve(name).alias for name in ("gpt", "", "SECOND:latest", "b")] == ["a", "a", "b", "b"]
    assert registry.resolve("b-query") == ResolvedName("b", "b", RequestDefaults(input_type="query"))
    for name in ("gpt", "SECOND:latest"):
        with pytest.raises(ModelNotFoundError):
            registry.alias_of(name)
    strict = Registry(ServedModels(specs=specs, preload=()), cast("ModelManager", Fleet()), RegistryConfig())
    assert strict.resolve("SECOND:latest").alias == "b"
    with pytest.raises(ModelNotFoundError, match="Served here: a, b"):
        strict.resolve("gpt")


async def test_added_model_is_served_under_all_its_names_until_it_is_removed(fleet: Callable[..., Any]) -> None:
    """An added model is served like a configured one. After its removal its names refer to no model."""
    async with fleet("a", "b") as models:
        await models.registry.remove(models.registry.add(ModelSpec(alias="b2", name="b2")))
        registry = models.registry
        models.models["new"] = models["b"]
        spec = ModelSpec(alias="new", name="acme/new-one")
        assert registry.add(spec) == registry.add(spec) == "new"
        assert not registry.status("new-one").configured
        assert len(await models.embed("acme/new-one")) == 1
        with pytest.raises(ModelInUseError, match="is taken"):
            registry.add(ModelSpec(alias="new", name="acme/another"))
        await registry.remove("new")
        for name in ("new", "acme/new-one", "new-one"):
            with pytest.raises(ModelNotFoundError):
                registry.lease(name)
        assert [status.spec.alias for status in registry.statuses()] == ["a", "b"]
        assert models["b"].in_memory == 0


async def test_removal_accepts_only_the_alias(fleet: Callable[..., Any]) -> None:
    """During a removal the name may refer to another model already, which a second removal must not remove."""
    async with fleet("a") as models:
        registry = models.registry
        for alias, name in (("new", "acme/first"), ("acme/new", "acme/new")):
            models.models[alias] = FakeModel()
            registry.add(ModelSpec(alias=alias, name=name))
        holding = await models.hold("new")
        removing = asyncio.create_task(registry.remove("new"))
        await until(lambda: registry.alias_of("new") == "acme/new")
        with pytest.raises(ModelNotFoundError):
            await registry.remove("new")
        models["new"].backend.gate.set()
        await holding
        assert (await removing).state is State.UNLOADED
        assert [status.spec.alias for status in registry.statuses()] == ["a", "acme/new"]


async def test_configured_model_cannot_be_removed(fleet: Callable[..., Any]) -> None:
    """The error names the setting, and the model is still served."""
    async with fleet("a") as models:
        with pytest.raises(NotAllowedError, match="MODEL_MAPPING"):
            await models.registry.remove("a")
        assert len(await models.embed("a")) == 1


async def test_model_removed_during_its_load_answers_waiting_requests(fleet: Callable[..., Any]) -> None:
    """Requests that wait for the load are answered. Then the model is unloaded."""
    async with fleet("a") as models:
        registry = models.registry
        models.models["new"] = FakeModel()
        registry.add(ModelSpec(alias="new", name="new"))
        models["new"].can_load.clear()
        request = asyncio.create_task(models.embed("new"))
        await until(models["new"].is_loading.is_set)
        removing = asyncio.create_task(registry.remove("new"))
        await asyncio.sleep(0)
        with pytest.raises(ModelNotFoundError):
            registry.lease("new")
        models["new"].can_load.set()
        assert len(await request) == 1
        await removing
        assert models["new"].in_memory == 0


async def test_model_removed_while_it_is_compiled_answers_waiting_requests(fleet: Callable[..., Any]) -> None:
    """The compiler stops, and requests that wait for it learn that the model is no longer served."""
    async with fleet("a") as models:
        registry = models.registry
        models.models["new"] = FakeModel()
        models["new"].can_compile.clear()
        registry.add(ModelSpec(alias="new", name="new"))
        loading = asyncio.create_task(registry.load("new"))
        await until(lambda: registry.status("new").progress is not None)
        await registry.remove("new")
        with pytest.raises(ModelNotReadyError, match="`new` is no longer served"):
            await loading


async def test_stop_during_a_load_frees_the_model(fleet: Callable[..., Any]) -> None:
    """Waiting requests fail, and the loading thread frees the model as soon as it is loaded."""
    async with fleet("a") as models:
        models["a"].can_load.clear()
        request = asyncio.create_task(models.embed("a"))
        await until(models["a"].is_loading.is_set)
        await models.registry.stop()
        with pytest.raises(ModelNotReadyError, match="shutting down"):
            await request
        assert models["a"].locks[0].is_released
        models["a"].can_load.set()
        await until(lambda: models["a"].backends and not models["a"].in_memory)
