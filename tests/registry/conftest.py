"""A registry of models that take no time and no memory, and do as a test tells them."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from emb_model_provider.artifacts.prepare import PreparedBackend
from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.registry import Registry, State, lifecycle
from emb_model_provider.registry import loader as loading
from emb_model_provider.serving.engine import EmbedOptions
from emb_model_provider.settings import (
    BatchSettings,
    HubSettings,
    LimitSettings,
    MemorySettings,
    ServedModels,
    TrustSettings,
)
from emb_model_provider.snapshots.snapshot import Snapshot
from tests.serving.fakes import FakeBackend

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import numpy as np

    from emb_model_provider.management.manager import ModelManager

MIB = 2**20
PATIENCE_S = 60.0
"""So long only where something is wrong."""


@pytest.fixture(autouse=True)
def quick_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave Python's garbage alone: it is all that a load of these models takes time for."""
    monkeypatch.setattr("emb_model_provider.serving.engine.freeze_gc", lambda: None)
    monkeypatch.setattr("emb_model_provider.serving.model_thread.trim_malloc", lambda: None)


class FakeHold:
    def __init__(self) -> None:
        self.released = False

    def release(self) -> None:
        self.released = True


class FakeModel:
    """What a test may decide of one model, and what it sees of it."""

    def __init__(self) -> None:
        self.holds: list[FakeHold] = []
        self.backends: list[FakeBackend] = []
        self.memory_bytes = 200 * MIB
        self.on_disk = 20 * MIB
        self.fetch_error: BaseException | None = None
        self.load_error: BaseException | None = None
        self.may_load = threading.Event()
        """Loading waits while it is clear."""
        self.may_load.set()
        self.loading = threading.Event()

    @property
    def backend(self) -> FakeBackend:
        """The one that was loaded last."""
        return self.backends[-1]

    @property
    def in_memory(self) -> int:
        return sum(not backend.closed for backend in self.backends)


class Fleet:
    """A registry, and the models in it by their aliases."""

    def __init__(self) -> None:
        self.models: dict[str, FakeModel] = {}
        self.registry: Registry
        self.most_in_memory = 0
        self._lock = threading.Lock()

    def __getitem__(self, alias: str) -> FakeModel:
        return self.models[alias]

    def acquire(self, spec: ModelSpec, _: object) -> tuple[Snapshot, FakeHold]:
        """As the manager does."""
        model = self.models[spec.alias]
        if model.fetch_error is not None:
            raise model.fetch_error
        hold = FakeHold()
        model.holds.append(hold)
        snapshot = Snapshot.of("local", spec.name, "local", Path("/nowhere"), ())
        return snapshot, hold

    def prepare(self, spec: ModelSpec, *_: object, **__: object) -> PreparedBackend:
        model = self.models[spec.alias]

        def load() -> FakeBackend:
            model.loading.set()
            assert model.may_load.wait(PATIENCE_S)
            if model.load_error is not None:
                raise model.load_error
            backend = FakeBackend(memory_bytes=model.memory_bytes)
            with self._lock:
                model.backends.append(backend)
                in_memory = sum(model.in_memory for model in self.models.values())
                self.most_in_memory = max(self.most_in_memory, in_memory)
            return backend

        return PreparedBackend(load, size=model.on_disk, backend="openvino")

    # --- asking -----------------------------------------------------------------------------------------

    async def embed(self, alias: str) -> np.ndarray:
        async with self.registry.lease(alias) as engine:
            return (await engine.embed(["w1 w2"], EmbedOptions())).vectors

    async def held(self, alias: str) -> asyncio.Task[np.ndarray]:
        """Begin a request that does not end before the gate of its model's backend is opened."""
        await self.registry.load(alias)
        backend = self[alias].backend
        backend.gate.clear()
        backend.entered.clear()
        asked = asyncio.create_task(self.embed(alias))
        await until(backend.entered.is_set)
        return asked

    def state(self, alias: str) -> State:
        return self.registry.status(alias).state

    def unloads(self) -> dict[str, dict[str, int]]:
        return {
            status.spec.alias: dict(status.unloads) for status in self.registry.statuses() if status.unloads
        }


async def until(condition: Callable[[], object]) -> None:
    """Wait until `condition()` is true."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Return what makes a registry of fake models: `async with fleet("a", "b", max_loaded_models=1) as models`."""

    @asynccontextmanager
    async def begin(
        *aliases: str,
        preload: tuple[str, ...] = (),
        watchdog_s: float = 60.0,
        request_timeout_s: float = 60.0,
        **residency: Any,
    ) -> AsyncIterator[Fleet]:
        made = Fleet()
        made.models = {alias: FakeModel() for alias in aliases}
        monkeypatch.setattr(loading, "prepare_backend", made.prepare)
        # What hangs here does so until the test says otherwise.
        monkeypatch.setattr(lifecycle, "_STOP_S", 0.05)
        made.registry = Registry(
            ServedModels(
                specs=tuple(ModelSpec(alias=alias, name=alias) for alias in aliases), preload=preload
            ),
            manager=cast("ModelManager", made),
            hubs=HubSettings(cache_dir=Path("/nowhere")),
            trust=TrustSettings(),
            batching=BatchSettings(),
            limits=LimitSettings(request_timeout_s=request_timeout_s),
            residency=MemorySettings(**residency),
            watchdog_s=watchdog_s,
            max_artifact_bytes=1,
            on_batch=lambda _: None,
        )
        try:
            yield made
        finally:
            for model in made.models.values():
                model.may_load.set()
                for backend in model.backends:
                    backend.gate.set()
            await made.registry.stop()

    return begin
