"""From a model's slot to an engine: its files, its backend, room in memory, and a first answer."""

from __future__ import annotations

import logging
import sys
import threading
import time
from typing import TYPE_CHECKING

from emb_model_provider.artifacts.prepare import PreparedBackend, prepare_backend
from emb_model_provider.backends.memory_estimate import least_bytes, likely_bytes
from emb_model_provider.concurrency import in_thread
from emb_model_provider.errors import LoadError
from emb_model_provider.formatting import format_cosine, format_size
from emb_model_provider.hubs.transfer import ProgressReporter
from emb_model_provider.registry.model_entry import State
from emb_model_provider.serving.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from emb_model_provider.backends.base import Backend, ModelDescription
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.registry.memory_budget import Room
    from emb_model_provider.registry.model_entry import Residence, Slot
    from emb_model_provider.serving.jobs import BatchRecord
    from emb_model_provider.serving.model_thread import Change
    from emb_model_provider.settings import (
        BatchSettings,
        FidelitySettings,
        HubSettings,
        LimitSettings,
        TrustSettings,
    )
    from emb_model_provider.snapshots.locks import SnapshotHold
    from emb_model_provider.snapshots.snapshot import Snapshot


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


def log_loaded(engine: Engine, snapshot: Snapshot, took_s: float) -> None:
    description = engine.description
    for note in description.notes:
        logger.warning("model %s: %s", engine.spec.alias, note)
    logger.info(
        "model %s is ready: %s at %s from %s, %d dimensions, %d tokens, %s pooling, %s on %s (%s), %s, %s, %.1f s",
        engine.spec.alias, snapshot.repository, snapshot.revision[:12], snapshot.hub, description.dimension,
        description.max_length, description.pooling, description.precision, description.device,
        description.backend, _fidelity_words(description), format_size(engine.memory_bytes), took_s,
    )  # fmt: skip


def _fidelity_words(description: ModelDescription) -> str:
    fidelity = description.fidelity
    if fidelity is None:
        return "the reference itself" if description.precision == "fp32" else "fidelity not measured"
    words = [
        f"cosine to fp32 {format_cosine(fidelity.min_cosine)} or more, mean {format_cosine(fidelity.mean_cosine)}"
    ]
    if fidelity.top10_overlap is not None:
        words.append(f"{100 * fidelity.top10_overlap:.1f} % of neighbours kept")
    if fidelity.spearman is not None:
        words.append(f"Spearman {format_cosine(fidelity.spearman)}")
    return f"{', '.join(words)} over {fidelity.texts} texts"
