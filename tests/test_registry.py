"""Several models side by side: real small models, fetched by the real clients from hubs on this machine."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from emb_model_provider.errors import ModelNotFoundError, ModelNotReadyError
from emb_model_provider.management.manager import ModelManager
from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.registry import Registry, State
from emb_model_provider.registry import registry as registry_module
from emb_model_provider.serving.engine import EmbedOptions
from emb_model_provider.settings import (
    BatchSettings,
    LimitSettings,
    ServedModels,
    Settings,
    TrustSettings,
)
from tests.hubs.servers import HuggingFaceServer, ModelScopeServer
from tests.models import FAMILIES, gte_configuration, save_modelscope

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

GTE = "damo/nlp_gte_sentence-embedding_chinese-base"
TEXTS = ["你好，世界", "hello world", "a longer text, of which there is a little more", ""]


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sentence-transformers directory."""
    return FAMILIES["bert-mean-normalize"](tmp_path_factory.mktemp("models") / "bert")


@pytest.fixture(scope="module")
def gte(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as ModelScope's GTE repositories have it: .bin weights, configuration.json, no modules.json."""
    return save_modelscope(tmp_path_factory.mktemp("models") / "gte", gte_configuration())


@pytest.fixture
def huggingface(bert: Path) -> Iterator[HuggingFaceServer]:
    with HuggingFaceServer(repos={"acme/bert": files_of(bert)}) as server:
        yield server


@pytest.fixture
def modelscope(gte: Path) -> Iterator[ModelScopeServer]:
    with ModelScopeServer(repos={GTE: files_of(gte)}) as server:
        yield server


def make(tmp_path: Path, *specs: ModelSpec, preload: tuple[str, ...] = (), **hubs: Any) -> Registry:
    settings = Settings.from_values(
        cache_dir=tmp_path / "own", modelscope_cache_dir=tmp_path / "ms", hf_cache_dir=tmp_path / "hf", **hubs
    )
    return Registry(
        ServedModels(specs=specs, preload=preload),
        manager=ModelManager(settings),
        hubs=settings.hubs,
        trust=TrustSettings(),
        batching=BatchSettings(),
        limits=LimitSettings(request_timeout_s=280),
        max_artifact_bytes=2**30,
        on_batch=lambda _: None,
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
    """Each alias has its own hub, precision and engine, and gives the vectors its files give from a directory."""
    registry = make(
        tmp_path,
        ModelSpec(alias="chinese", name=GTE, source="modelscope", device="cpu", backend="torch"),
        ModelSpec(alias="english", name="acme/bert", source="huggingface", device="cpu", backend="torch"),
        ModelSpec(
            alias="english-16",
            name="acme/bert",
            source="huggingface",
            device="cpu",
            backend="torch",
            precision="fp16",
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
        np.testing.assert_allclose(
            await vectors(registry, "chinese"), await vectors(registry, "gte-dir"), atol=1e-5
        )
        np.testing.assert_allclose(
            await vectors(registry, "english"), await vectors(registry, "bert-dir"), atol=1e-5
        )
        half = await vectors(registry, "english-16")
        assert not np.array_equal(half, await vectors(registry, "bert-dir"))
        status = registry.status("chinese")
        assert status.description is not None
        assert (status.description.pooling, status.description.normalize) == ("cls", False)
        assert status.snapshot is not None
        assert (status.snapshot.hub, registry.status("english").snapshot.hub) == ("modelscope", "huggingface")  # type: ignore[union-attr]
    finally:
        await registry.stop()


async def test_many_callers_of_a_lazy_model_load_it_once(
    tmp_path: Path, huggingface: HuggingFaceServer
) -> None:
    """A model that is not loaded at the start is loaded by the first request, for all that wait."""
    registry = make(
        tmp_path,
        ModelSpec(alias="m", name="acme/bert", device="cpu", backend="torch"),
        hf_endpoint=huggingface.url,
    )
    try:
        assert registry.status("m").state is State.UNLOADED
        assert huggingface.requests == []
        dimensions = await asyncio.gather(*(dimension(registry, "m") for _ in range(20)))
        assert len(dimensions) == 20
        assert set(huggingface.bodies().values()) == {1}
    finally:
        await registry.stop()


async def test_a_caller_that_gives_up_does_not_end_the_load_for_the_others(
    tmp_path: Path, huggingface: HuggingFaceServer
) -> None:
    """The load is shared: cancelling the first caller leaves the second waiting for it."""
    registry = make(
        tmp_path,
        ModelSpec(alias="m", name="acme/bert", device="cpu", backend="torch"),
        hf_endpoint=huggingface.url,
    )
    try:
        first, second = (asyncio.create_task(dimension(registry, "m")) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        assert await second > 0
        assert set(huggingface.bodies().values()) == {1}
    finally:
        await registry.stop()


async def test_a_model_that_fails_says_why_and_leaves_the_others_serving(
    tmp_path: Path, huggingface: HuggingFaceServer, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason is told on request, and when to come back; until then the hub is not asked again."""
    # The others may take longer to load than the half minute that this is.
    monkeypatch.setattr(registry_module, "_FAILED_RETRY_AFTER_S", 1000.0)
    registry = make(
        tmp_path,
        ModelSpec(alias="gone", name="acme/gone", device="cpu", backend="torch"),
        ModelSpec(alias="misplaced", name="m", path=bert / "elsewhere", device="cpu", backend="torch"),
        ModelSpec(alias="works", name="acme/bert", device="cpu", backend="torch"),
        preload=("gone", "misplaced", "works"),
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


async def test_a_failed_load_is_tried_again_after_a_while(
    tmp_path: Path, huggingface: HuggingFaceServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub that was down comes back, and so does the model, without a restart."""
    monkeypatch.setattr(registry_module, "_FAILED_RETRY_AFTER_S", 0.0)
    registry = make(
        tmp_path,
        ModelSpec(alias="m", name="acme/bert", device="cpu", backend="torch"),
        preload=("m",),
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


async def test_a_stopped_registry_lets_nobody_in(tmp_path: Path, bert: Path) -> None:
    """After `stop` requests are told that the service is going away."""
    registry = make(
        tmp_path, ModelSpec(alias="m", name="m", path=bert, device="cpu", backend="torch"), preload=("m",)
    )
    await registry.preload()
    await registry.stop()
    assert registry.status("m").state is State.UNLOADED
    with pytest.raises(ModelNotReadyError, match="shutting down"):
        await dimension(registry, "m")


def test_names_resolve_from_alias_to_id_to_unique_last_part(tmp_path: Path) -> None:
    """An alias wins over an id, an id over a last part; an id means its first alias, an unclear last part nothing."""
    registry = make(
        tmp_path,
        ModelSpec(alias="bge-m3", name="other/model"),
        ModelSpec(alias="a", name="BAAI/bge-m3"),
        ModelSpec(alias="b", name="x/twin"),
        ModelSpec(alias="c", name="y/twin"),
        ModelSpec(alias="d", name="z/shared"),
        ModelSpec(alias="e", name="z/shared"),
        ModelSpec(alias="org/long-name", name="org/long-name"),
    )
    assert registry.default_alias == "bge-m3"
    assert registry.alias_of("bge-m3") == "bge-m3"
    assert registry.alias_of("BAAI/bge-m3") == "a"
    assert registry.alias_of("model") == "bge-m3"
    assert registry.alias_of("long-name") == "org/long-name"
    assert registry.alias_of("y/twin") == "c"
    assert registry.alias_of("z/shared") == "d"
    for unclear in ("twin", "shared", "nothing", ""):
        with pytest.raises(ModelNotFoundError, match="does not exist"):
            registry.alias_of(unclear)
