"""Models on disk that are served when a request names them, and what the errors say of other models."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from emb_model_provider.errors import ModelNotFoundError, ModelNotReadyError, NotCachedError, OfflineError
from emb_model_provider.management.cache_index import CacheView, ServableModel
from emb_model_provider.management.inventory import CacheEntry
from emb_model_provider.management.types import DownloadRecord
from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.registry import OnDemandModels, Registry, RegistryConfig, State
from emb_model_provider.settings import MemorySettings, ServedModels
from emb_model_provider.snapshots.snapshot import Snapshot
from tests.registry.helpers import MIB, FakeModel, Fleet

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from emb_model_provider.management.manager import ModelManager

SERVED, CACHED, OTHER = "acme/served", "acme/cached", "acme/other"


class Disk:
    """The models on disk, and the downloads that are running. It is used as the index and as the jobs."""

    def __init__(self) -> None:
        self.aliases = [CACHED, OTHER]
        self.incomplete: list[CacheEntry] = []
        self.jobs: list[tuple[ModelSpec, DownloadRecord]] = []

    def recent_view(self, max_age_s: float) -> CacheView | None:
        return None

    def view(self) -> CacheView:
        return CacheView([servable(alias) for alias in self.aliases], self.incomplete)

    def running_downloads(self) -> list[tuple[ModelSpec, DownloadRecord]]:
        return self.jobs


def servable(alias: str) -> ServableModel:
    snapshot = Snapshot.of("huggingface", alias, "abc", Path("/nowhere"), ())
    return ServableModel(
        ModelSpec(alias=alias, name=alias), snapshot, 10 * MIB, 1_700_000_000, is_dependency=alias == OTHER
    )


def download(name: str, **values: Any) -> tuple[ModelSpec, DownloadRecord]:
    empty = dict.fromkeys(DownloadRecord.model_fields)
    record = {
        "id": "1", "kind": "download", "state": "running", "model_name": name, "source": "huggingface", "force": False,
        "compile": False, "cancelling": False, "done_bytes": 0, "notes": [], "created": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    return ModelSpec(alias=name, name=name), DownloadRecord(**{**empty, **record, **values})


@asynccontextmanager
async def on_demand(
    *, serves_cached: bool = True, answers_unknown: bool = False, default_memory_bytes: int | None = None
) -> AsyncIterator[tuple[OnDemandModels, Fleet, Disk]]:
    fleet, disk = Fleet(SERVED), Disk()
    fleet.models |= {CACHED: FakeModel(), OTHER: FakeModel()}
    specs = (ModelSpec(alias=SERVED, name=SERVED),)
    served = ServedModels(specs, (SERVED,), answers_unknown=answers_unknown)
    config = RegistryConfig(memory=MemorySettings(), default_memory_bytes=default_memory_bytes)
    fleet.registry = Registry(served, cast("ModelManager", fleet), config)
    try:
        yield (
            OnDemandModels(fleet.registry, cast("Any", disk), cast("Any", disk), serves_cached=serves_cached),
            fleet,
            disk,
        )
    finally:
        await fleet.registry.stop()


async def test_model_on_disk_is_served_when_a_request_names_it() -> None:
    """It is loaded once, from the files on disk only, and stays a served model."""
    async with on_demand() as (models, fleet, _):
        assert [status.spec.alias for status in fleet.registry.statuses()] == [SERVED]
        resolved = await models.resolve(f"openai/{CACHED}")
        assert resolved.alias == CACHED
        assert len(await fleet.embed(CACHED)) == 1
        assert (await models.resolve(CACHED)).alias == CACHED
        assert len(fleet[CACHED].backends) == 1
        assert fleet.offline == {CACHED}
        assert fleet.registry.status(CACHED).configured is False


async def test_models_on_disk_are_listed_without_being_loaded() -> None:
    """After the served ones, and once. A base model of another one is not listed, and can be named."""
    async with on_demand() as (models, fleet, _):
        listed = [(status.spec.alias, status.state) for status in await models.statuses()]
        assert listed == [(SERVED, State.UNLOADED), (CACHED, State.UNLOADED)]
        status, resolved = await models.status(CACHED)
        assert (status.created, status.snapshot and status.snapshot.revision) == (1_700_000_000, "abc")
        assert resolved.alias == CACHED
        assert len(fleet.registry.statuses()) == 1
        await models.resolve(CACHED)
        assert [status.spec.alias for status in await models.statuses()] == [SERVED, CACHED]
        assert (await models.resolve(OTHER)).alias == OTHER


async def test_removed_model_is_no_longer_served() -> None:
    """A request does not download it again, unless it was loaded when its files were removed."""
    async with on_demand() as (models, fleet, disk):
        await models.resolve(CACHED)
        await fleet.embed(CACHED)
        disk.aliases.clear()
        assert (await models.resolve(CACHED)).alias == CACHED
        await fleet.registry.unload(CACHED)
        with pytest.raises(ModelNotFoundError, match="does not exist"):
            await models.resolve(CACHED)
        assert [status.spec.alias for status in fleet.registry.statuses()] == [SERVED]


async def test_files_that_are_removed_before_the_load() -> None:
    """The error says how to get them again, and nothing about the setting OFFLINE."""
    async with on_demand() as (models, fleet, _):
        await models.resolve(CACHED)
        fleet[CACHED].fetch_error = OfflineError("EMB_PROVIDER_OFFLINE forbids it")
        with pytest.raises(NotCachedError, match=f"emb-provider pull {CACHED}") as caught:
            await fleet.registry.load(CACHED)
        assert "OFFLINE" not in str(caught.value)


async def test_without_the_setting_the_error_says_how_to_load_a_model() -> None:
    async with on_demand(serves_cached=False) as (models, fleet, _):
        for find in (models.resolve, models.status):
            with pytest.raises(ModelNotFoundError) as caught:
                await find(CACHED)
            for phrase in (
                "on the disk",
                f"emb-provider load {CACHED}",
                "EMB_PROVIDER_SERVE_CACHED",
                f"Served here: {SERVED}",
            ):
                assert phrase in str(caught.value)
        assert [status.spec.alias for status in await models.statuses()] == [SERVED]
        assert len(fleet.registry.statuses()) == 1


async def test_model_on_disk_comes_before_the_default_model() -> None:
    """If the default model answers requests for unknown models."""
    async with on_demand(answers_unknown=True) as (models, _, _):
        assert (await models.resolve("gpt-4")).alias == SERVED
        assert (await models.resolve(CACHED)).alias == CACHED
    async with on_demand(answers_unknown=True, serves_cached=False) as (models, _, _):
        assert (await models.resolve(CACHED)).alias == SERVED


@pytest.mark.parametrize(
    ("job", "phrase", "retry_after_s"),
    [
        ({"phase": "download", "done_bytes": 25 * MIB, "total_bytes": 100 * MIB, "bytes_per_s": 5.0 * MIB},
         "download 26.2 MB of 105 MB (25 %), about 15 s left", 15),
        ({"phase": "download", "done_bytes": 25 * MIB, "total_bytes": 100 * MIB}, "download 26.2 MB of 105 MB (25 %)", 10),
        ({"phase": "compile"}, "compile", 10),
        ({"state": "queued"}, "waits for other downloads", 10),
    ],
    ids=str,
)  # fmt: skip
async def test_error_for_a_model_that_is_being_downloaded_has_its_progress(
    job: dict[str, Any], phrase: str, retry_after_s: float
) -> None:
    """Clients try it again later; not if the model would not be served then."""
    async with on_demand() as (models, _, disk):
        disk.jobs = [download("acme/new", **job)]
        with pytest.raises(ModelNotReadyError, match="being downloaded") as caught:
            await models.resolve("new:latest")
        assert phrase in str(caught.value)
        assert caught.value.retry_after_s == retry_after_s
    async with on_demand(serves_cached=False) as (models, _, disk):
        disk.jobs = [download("acme/new", **job)]
        with pytest.raises(ModelNotFoundError, match="is not served"):
            await models.resolve("acme/new")


@pytest.mark.parametrize(("in_use", "error", "phrase"), [
    (True, ModelNotReadyError, "26.2 MB so far, by another process"),
    (False, ModelNotFoundError, "emb-provider pull acme/new` continues it"),
])  # fmt: skip
async def test_download_of_another_process(in_use: bool, error: type[Exception], phrase: str) -> None:
    async with on_demand() as (models, _, disk):
        entry = CacheEntry(hub="huggingface", name="acme/new", path=None, state="incomplete", files_size=25 * MIB)
        disk.incomplete = [replace(entry, in_use=in_use)]
        with pytest.raises(error) as caught:
            await models.resolve("acme/new")
        assert phrase in str(caught.value)


async def test_least_recently_used_model_leaves_memory() -> None:
    """Without limits in the settings, the models on disk take no more than a share of the memory."""
    async with on_demand(default_memory_bytes=450 * MIB) as (models, fleet, _):
        for name in (SERVED, CACHED, OTHER):
            await models.resolve(name)
            await fleet.embed(name)
        assert [fleet[name].in_memory for name in (SERVED, CACHED, OTHER)] == [0, 1, 1]
        assert len(await fleet.embed(SERVED)) == 1
        fleet[OTHER].memory_bytes = 600 * MIB
        await fleet.registry.unload(OTHER)
        assert len(await fleet.embed(OTHER)) == 1  # it is alone then
        assert fleet.max_in_memory <= 3
