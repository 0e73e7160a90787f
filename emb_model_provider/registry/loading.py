"""From a model's slot to an engine: its files, its backend, room in memory, and a first answer."""

from __future__ import annotations

import logging
import sys
import threading
import time
from typing import TYPE_CHECKING

from emb_model_provider.backends.memory import least_bytes, likely_bytes
from emb_model_provider.compile.prepare import PreparedBackend, prepare_backend
from emb_model_provider.errors import LoadError
from emb_model_provider.hubs.progress import ProgressReporter
from emb_model_provider.registry.slots import State
from emb_model_provider.registry.threads import in_thread
from emb_model_provider.registry.words import log_loaded
from emb_model_provider.serving.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from emb_model_provider.backends.base import Backend
    from emb_model_provider.hubs.snapshot import Snapshot
    from emb_model_provider.management.holds import SnapshotHold
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.registry.room import Room
    from emb_model_provider.registry.slots import Residence, Slot
    from emb_model_provider.serving.jobs import BatchRecord
    from emb_model_provider.serving.worker import Change
    from emb_model_provider.settings import (
        BatchSettings,
        FidelitySettings,
        HubSettings,
        LimitSettings,
        TrustSettings,
    )

logger = logging.getLogger(__name__)


class Loader:
    """Loads models, any number side by side; of those that are compiled, one at a time."""

    def __init__(
        self,
        *,
        manager: ModelManager,
        hubs: HubSettings,
        trust: TrustSettings,
        batching: BatchSettings,
        limits: LimitSettings,
        max_artifact_bytes: int,
        fidelity: FidelitySettings | None,
        watchdog_s: float,
        executor: Executor,
        on_batch: Callable[[BatchRecord], None],
        stopping: Callable[[], bool],
    ) -> None:
        """`stopping` says whether the service is about to end, which ends compiling; it is asked on any thread."""
        self._manager = manager
        self._hubs = hubs
        self._trust = trust
        self._batching = batching
        self._limits = limits
        self._max_artifact_bytes = max_artifact_bytes
        self._fidelity = fidelity
        self._watchdog_s = watchdog_s
        self._executor = executor
        self._on_batch = on_batch
        self._stopping = stopping
        self._compiling = threading.Lock()

    async def load(
        self, residence: Residence, room: Room, on_change: Callable[[Change, str], None]
    ) -> Engine:
        """Load a model into memory once there is room, and set its slot's state on the way.

        `on_change` is called on the model's thread when it breaks down, comes back or is given up.

        Where this raises or is cancelled, what `residence` took or held is the caller's to give back.

        Raises: HubError, LoadError, InterruptedError when stopping; what a model's own code raises.
        """
        slot, started = residence.slot, time.monotonic()
        alias = slot.spec.alias
        slot.state = State.DOWNLOADING
        logger.info("loading model %s", alias)
        snapshot, residence.hold = await in_thread(f"fetch-{alias}", lambda: self._acquire(slot.spec))
        slot.snapshot = snapshot
        slot.state = State.LOADING
        first: PreparedBackend | None = await in_thread(
            f"prepare-{alias}", lambda: self._prepare(slot, snapshot)
        )
        if first is None:
            raise RuntimeError("a backend was prepared")
        slot.state = State.LOADING
        files = first.backend, first.size, slot.spec.precision
        await room.admit(
            residence, slot.known_bytes or least_bytes(*files), slot.known_bytes or likely_bytes(*files)
        )

        def load() -> Backend:
            nonlocal first
            # Prepared again for every later load: an artifact may be gone by then.
            ready = first or self._prepare(slot, snapshot)
            first = None
            return ready.load()

        engine = await Engine.start(
            slot.spec,
            load,
            batching=self._batching,
            limits=self._limits,
            executor=self._executor,
            on_batch=self._on_batch,
            watchdog_s=self._watchdog_s,
            on_change=on_change,
        )
        slot.known_bytes = engine.memory_bytes
        try:
            room.require_fits(engine.memory_bytes)
        except LoadError:
            await in_thread(f"stop-{alias}", engine.stop)
            raise
        log_loaded(engine, snapshot, time.monotonic() - started)
        return engine

    def _acquire(self, spec: ModelSpec) -> tuple[Snapshot, SnapshotHold]:
        with ProgressReporter(terminal=sys.stderr) as report:
            return self._manager.acquire(spec, report)

    def _prepare(self, slot: Slot, snapshot: Snapshot) -> PreparedBackend:
        """Choose the slot's backend, compiling where that is needed. Blocks; runs on a thread of its own."""
        my_turn = False

        def begin_compiling() -> None:
            nonlocal my_turn
            slot.state = State.COMPILING
            # Compiling takes all processors: two at a time would each take more than twice as long.
            while not (my_turn := self._compiling.acquire(timeout=0.2)):
                if self._stopping():
                    raise InterruptedError("stopped while waiting to compile")

        try:
            return prepare_backend(
                slot.spec,
                snapshot,
                trust_remote_code=self._may_run_code(slot.spec, snapshot),
                cache_dir=self._hubs.cache_dir,
                max_cache_bytes=self._max_artifact_bytes,
                on_compiling=begin_compiling,
                stopped=self._stopping,
                fidelity=self._fidelity,
            )
        finally:
            if my_turn:
                self._compiling.release()

    def _may_run_code(self, spec: ModelSpec, snapshot: Snapshot) -> bool:
        trusted = self._trust.allows(spec, snapshot.hub)
        if trusted:
            logger.warning(
                "model %s: trust_remote_code is on: code from %s at revision %s may run in this process",
                spec.alias, snapshot.repository, snapshot.revision,
            )  # fmt: skip
        return trusted
