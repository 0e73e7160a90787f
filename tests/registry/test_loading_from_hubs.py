"""Small real models, downloaded by the real clients from hub servers on this machine."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from emb_model_provider.errors import ModelNotReadyError
from emb_model_provider.management.manager import ModelManager
from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.registry import Registry, RegistryConfig, State
from emb_model_provider.serving.config import Timings
from emb_model_provider.serving.engine import EmbedOptions
from emb_model_provider.settings import LimitSettings, ServedModels, Settings
from tests.hubs.servers import HuggingFaceServer, ModelScopeServer
from tests.models import FAMILIES, gte_configuration, save_modelscope

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GTE = "damo/nlp_gte_sentence-embedding_chinese-base"
TEXTS = ["你好，世界", "hello world", "a longer text, of which there is a little more", ""]


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a sentence-transformers directory."""
    return FAMILIES["bert-mean-normalize"](tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def gte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory like the GTE repositories of ModelScope: .bin weights, configuration.json, no modules.json."""
    return save_modelscope(tmp_path_factory.mktemp("models") / "gte", gte_configuration())


@pytest.fixture
def huggingface(bert: Path) -> Iterator[HuggingFaceServer]:
    with HuggingFaceServer(repos={"acme/bert": files_of(bert)}) as server:
        yield server


@pytest.fixture
def modelscope(gte: Path) -> Iterator[ModelScopeServer]:
    with ModelScopeServer(repos={GTE: files_of(gte)}) as server:
        yield server


def make_registry(
    tmp_path: Path, *specs: ModelSpec, preload: tuple[str, ...] = (), retry_after_failure_s: float = 30.0, **hubs: Any
) -> Registry:
    settings = Settings.from_values(
        cache_dir=tmp_path / "own", modelscope_cache_dir=tmp_path / "ms", hf_cache_dir=tmp_path / "hf", **hubs
    )
    return Registry(
        ServedModels(specs=specs, preload=preload),
        ModelManager(settings),
        RegistryConfig(
            limits=LimitSettings(request_timeout_s=280), timings=Timings(retry_after_failure_s=retry_after_failure_s)
        ),
    )


async def vectors(registry: Registry, name: str) -> np.ndarray:
    async with registry.lease(name) as engine:
        return (await engine.embed(TEXTS, EmbedOptions())).vectors


async def dimension(registry: Registry, name: str) -> int:
    async with registry.lease(name) as engine:
        return engine.description.dimension


async def test_models_of_different_hubs_and_precisions_serve_side_by_side(
    tmp_path: Path, huggingface: HuggingFaceServer, modelscope: ModelScopeServer, bert: Path, gte: Path
) -> None:
    """Each alias has its own hub, precision and engine, and returns the vectors of the same files in a directory."""
    registry = make_registry(
        tmp_path,
        ModelSpec(alias="chinese", name=GTE, source="modelscope", device="cpu", backend="torch"),
        ModelSpec(alias="english", name="acme/bert", source="huggingface", device="cpu", backend="torch"),
        ModelSpec(
            alias="english-16", name="acme/bert", source="huggingface", device="cpu", backend="torch", precision="fp16"
        ),
        ModelSpec(alias="gte-dir", name=str(gte), path=gte, device="cpu", backend="torch"),
        ModelSpec(alias="bert-dir", name="bert-dir", path=bert, device="cpu", backend="torch"),
        preload=("chinese", "english", "english-16", "gte-dir", "bert-dir"),
        modelscope_endpoint=modelscope.url,
        hf_endpoint=huggingface.url,
    )
    try:
        assert await registry.preload()
        assert {status.state for status in registry.statuses()} == {State.READY}
        np.testing.assert_allclose(await vectors(registry, "chinese"), await vectors(registry, "gte-dir"), atol=1e-5)
        np.testing.assert_allclose(await vectors(registry, "english"), await vectors(registry, "bert-dir"), atol=1e-5)
        half = await vectors(registry, "english-16")
        assert not np.array_equal(half, await vectors(registry, "bert-dir"))
        status = registry.status("chinese")
        assert status.description is not None
        assert (status.description.pooling, status.description.normalize) == ("cls", False)
        assert status.snapshot is not None
        assert (status.snapshot.hub, registry.status("english").snapshot.hub) == ("modelscope", "huggingface")  # type: ignore[union-attr]
    finally:
        await registry.stop()


async def test_concurrent_requests_load_a_model_once(tmp_path: Path, huggingface: HuggingFaceServer) -> None:
    """A model that is not preloaded is loaded by the first request, for all requests that wait for it."""
    registry = make_registry(
        tmp_path, ModelSpec(alias="m", name="acme/bert", device="cpu", backend="torch"), hf_endpoint=huggingface.url
    )
    try:
        assert registry.status("m").state is State.UNLOADED
        assert huggingface.requests == []
        dimensions = await asyncio.gather(*(dimension(registry, "m") for _ in range(20)))
        assert len(dimensions) == 20
        assert set(huggingface.bodies().values()) == {1}
    finally:
        await registry.stop()


async def test_cancelled_request_does_not_cancel_the_load(tmp_path: Path, huggingface: HuggingFaceServer) -> None:
    """The load is shared, so another request that waits for it is served."""
    registry = make_registry(
        tmp_path, ModelSpec(alias="m", name="acme/bert", device="cpu", backend="torch"), hf_endpoint=huggingface.url
    )
    try:
        first, second = (asyncio.create_task(dimension(registry, "m")) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        assert await second > 0
        assert set(huggingface.bodies().values()) == {1}
    finally:
        await registry.stop()


async def test_failed_model_reports_its_error_and_does_not_affect_others(
    tmp_path: Path, huggingface: HuggingFaceServer, bert: Path
) -> None:
    """Requests fail with the error and a Retry-After. Until then no request is sent to the hub."""
    registry = make_registry(
        tmp_path,
        ModelSpec(alias="gone", name="acme/gone", device="cpu", backend="torch"),
        ModelSpec(alias="misplaced", name="m", path=bert / "elsewhere", device="cpu", backend="torch"),
        ModelSpec(alias="works", name="acme/bert", device="cpu", backend="torch"),
        preload=("gone", "misplaced", "works"),
        # Longer than loading the other model takes.
        retry_after_failure_s=1000.0,
        hf_endpoint=huggingface.url,
    )
    try:
        assert await registry.preload()
        assert len(await vectors(registry, "works")) == len(TEXTS)
        with pytest.raises(ModelNotReadyError, match=r"elsewhere does not exist"):
            await dimension(registry, "misplaced")
        huggingface.forget()
        with pytest.raises(ModelNotReadyError, match="acme/gone") as caught:
            await dimension(registry, "gone")
        assert 0 < caught.value.retry_after_s <= 1000
        assert huggingface.requests == []
        assert registry.status("gone").error
    finally:
        await registry.stop()


async def test_failed_model_is_loaded_again_after_a_while(tmp_path: Path, huggingface: HuggingFaceServer) -> None:
    """A model is loaded when its hub is available again, without a restart of the service."""
    registry = make_registry(
        tmp_path,
        ModelSpec(alias="m", name="acme/bert", device="cpu", backend="torch"),
        preload=("m",),
        retry_after_failure_s=0.0,
        hf_endpoint=huggingface.url,
    )
    try:
        huggingface.faults.status = 503
        assert not await registry.preload()
        huggingface.faults.status = None
        assert await dimension(registry, "m") > 0
        assert registry.status("m").error is None
    finally:
        await registry.stop()


async def test_stopped_registry_rejects_requests(tmp_path: Path, bert: Path) -> None:
    """After `stop`, requests fail because the service is shutting down."""
    registry = make_registry(
        tmp_path, ModelSpec(alias="m", name="m", path=bert, device="cpu", backend="torch"), preload=("m",)
    )
    await registry.preload()
    await registry.stop()
    assert registry.status("m").state is State.UNLOADED
    with pytest.raises(ModelNotReadyError, match="shutting down"):
        await dimension(registry, "m")
