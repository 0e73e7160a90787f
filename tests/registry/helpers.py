"""A registry of fake models, which take no time and no memory and fail on demand."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from emb_model_provider.artifacts.prepare import PreparedBackend
from emb_model_provider.progress import Progress, ignore_progress
from emb_model_provider.serving.engine import EmbedOptions
from emb_model_provider.snapshots.snapshot import Snapshot
from tests.serving.fakes import FakeBackend, describe
from tests.serving.helpers import TIMEOUT_S, until

if TYPE_CHECKING:
    import numpy as np

    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.progress import CancelToken, OnProgress
    from emb_model_provider.registry import Registry, State

MIB = 2**20


class FakeLock:
    """A lock on a snapshot."""

    def __init__(self) -> None:
        self.is_released = False

    def release(self) -> None:
        self.is_released = True


class FakeModel:
    """What tests control and observe of one model."""

    def __init__(self) -> None:
        self.locks: list[FakeLock] = []
        self.backends: list[FakeBackend] = []
        self.description = describe()
        self.memory_bytes = 200 * MIB
        self.size_on_disk = 20 * MIB
        self.interims: list[FakeBackend] = []
        """Backends that serve until the model is compiled."""
        self.interim_error: BaseException | None = None
        self.can_start_interim = threading.Event()
        self.can_start_interim.set()
        self.can_compile = threading.Event()
        """A compilation waits until it is set."""
        self.can_compile.set()
        self.compile_error: BaseException | None = None
        self.fetch_error: BaseException | None = None
        self.load_error: BaseException | None = None
        self.can_load = threading.Event()
        """A load waits until it is set."""
        self.can_load.set()
        self.is_loading = threading.Event()

    @property
    def backend(self) -> FakeBackend:
        """The backend that was loaded last."""
        return self.backends[-1]

    @property
    def in_memory(self) -> int:
        """Number of backends that are not closed."""
        return sum(not backend.closed for backend in self.backends)


class Fleet:
    """A registry and its models by alias. It also stands for the manager and the preparer of the registry."""

    registry: Registry

    def __init__(self, *aliases: str) -> None:
        self.models = {alias: FakeModel() for alias in aliases}
        self.max_in_memory = 0
        self.offline: set[str] = set()
        """Aliases of models that were loaded without asking a hub."""
        self._lock = threading.Lock()

    def __getitem__(self, alias: str) -> FakeModel:
        return self.models[alias]

    async def embed(self, alias: str, text: str = "w1 w2") -> np.ndarray:
        async with self.registry.lease(alias) as engine:
            return (await engine.embed([text], EmbedOptions())).vectors

    async def hold(self, alias: str) -> asyncio.Task[np.ndarray]:
        """Start a request that does not end before the gate of its model's backend is opened."""
        await self.registry.load(alias)
        backend = self[alias].backend
        backend.gate.clear()
        backend.entered.clear()
        holding = asyncio.create_task(self.embed(alias))
        await until(backend.entered.is_set)
        return holding

    def state(self, alias: str) -> State:
        return self.registry.status(alias).state

    def unloads(self) -> dict[str, dict[str, int]]:
        return {status.spec.alias: dict(status.unloads) for status in self.registry.statuses() if status.unloads}

    # --- as manager and preparer ----------------------------------------------------------------------

    @property
    def preparer(self) -> Fleet:
        return self

    def allows_code(self, spec: ModelSpec, snapshot: Snapshot) -> bool:
        return False

    def acquire(self, spec: ModelSpec, *, offline: bool = False, **_: object) -> tuple[Snapshot, FakeLock]:
        if offline:
            self.offline.add(spec.alias)
        model = self.models[spec.alias]
        if model.fetch_error is not None:
            raise model.fetch_error
        lock = FakeLock()
        model.locks.append(lock)
        snapshot = Snapshot.of("local", spec.name, "local", Path("/nowhere"), ())
        return snapshot, lock

    def is_compiled_later(self, spec: ModelSpec, snapshot: Snapshot) -> bool:
        return not self.models[spec.alias].can_compile.is_set()

    def load_interim(self, spec: ModelSpec, snapshot: Snapshot, cancel: CancelToken) -> FakeBackend:
        model = self.models[spec.alias]
        while not model.can_start_interim.wait(0.01):
            cancel.raise_if_cancelled()
        if model.interim_error is not None:
            raise model.interim_error
        model.interims.append(FakeBackend(model.description, memory_bytes=900 * MIB))
        return model.interims[-1]

    def prepare(
        self, spec: ModelSpec, snapshot: Snapshot, *, cancel: CancelToken, on_progress: OnProgress = ignore_progress
    ) -> PreparedBackend:
        model = self.models[spec.alias]
        if not model.can_compile.is_set():
            step = Progress("compile", spec.name, step="export", step_number=3, step_count=6, seconds_left=20.0)
            on_progress(step)
        while not model.can_compile.wait(0.01):
            cancel.raise_if_cancelled()
        if model.compile_error is not None:
            raise model.compile_error

        def load() -> FakeBackend:
            model.is_loading.set()
            assert model.can_load.wait(TIMEOUT_S)
            if model.load_error is not None:
                raise model.load_error
            backend = FakeBackend(model.description, memory_bytes=model.memory_bytes)
            with self._lock:
                model.backends.append(backend)
                in_memory = sum(model.in_memory for model in self.models.values())
                self.max_in_memory = max(self.max_in_memory, in_memory)
            return backend

        return PreparedBackend(load, size=model.size_on_disk, backend="openvino")
