"""Loads a model into memory: fetches its files, prepares its backend, reserves memory, starts its engine."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from emb_model_provider.backends.memory_estimate import expected_bytes, interim_bytes, minimum_bytes
from emb_model_provider.backends.pipeline_plan import is_warning
from emb_model_provider.concurrency import run_in_daemon_thread
from emb_model_provider.errors import HubError, LoadError, NotCachedError
from emb_model_provider.formatting import format_cosine, format_size
from emb_model_provider.progress import CancelToken, ProgressReporter
from emb_model_provider.serving.engine import Engine
from emb_model_provider.serving.request_options import check_input_types

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor

    from emb_model_provider.artifacts.prepare import BackendPreparer, PreparedBackend
    from emb_model_provider.backends.base import Backend, ModelDescription
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.progress import OnProgress, Progress
    from emb_model_provider.registry.memory_budget import MemoryBudget
    from emb_model_provider.registry.model_entry import LoadedModel, ModelEntry
    from emb_model_provider.serving.config import EngineConfig
    from emb_model_provider.serving.model_thread import StateChange
    from emb_model_provider.snapshots.locks import FileLock
    from emb_model_provider.snapshots.snapshot import Snapshot

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class ReloadableBackend:
    """A backend that can be opened again after it has crashed."""

    preparer: BackendPreparer
    spec: ModelSpec
    snapshot: Snapshot
    cancel: CancelToken
    prepared: PreparedBackend | None
    """Used by the first `open`. Later ones prepare again, because an artifact may have been removed meanwhile."""

    def open(self) -> Backend:
        """Load the backend, on the thread that will own it."""
        prepared, self.prepared = self.prepared, None
        if prepared is None:
            prepared = self.preparer.prepare(self.spec, self.snapshot, cancel=self.cancel)
        return prepared.load()


class Loader:
    """Loads models, any number of them in parallel."""

    def __init__(self, manager: ModelManager, config: EngineConfig, executor: Executor, cancel: CancelToken) -> None:
        """Create a loader; `cancel` ends downloads and compiling when the service shuts down."""
        self._manager = manager
        self._config = config
        self._executor = executor
        self._cancel = cancel

    async def fetch(self, loaded_model: LoadedModel, on_progress: OnProgress) -> Snapshot:
        """Make the files of a model complete, and lock them. The caller must release the lock if the load fails."""
        entry = loaded_model.entry
        alias = entry.spec.alias
        logger.info("loading model %s", alias)
        snapshot, loaded_model.snapshot_lock = await run_in_daemon_thread(
            f"fetch-{alias}", lambda: self._fetch(entry, on_progress)
        )
        entry.snapshot = snapshot
        return snapshot

    async def prepare(self, entry: ModelEntry, snapshot: Snapshot, on_progress: OnProgress) -> PreparedBackend:
        """Make sure that the backend of a model can be loaded within seconds, compiling the model if necessary."""
        return await run_in_daemon_thread(
            f"prepare-{entry.spec.alias}", lambda: self._prepare(entry, snapshot, on_progress)
        )

    async def load(
        self,
        loaded_model: LoadedModel,
        snapshot: Snapshot,
        prepared: PreparedBackend,
        budget: MemoryBudget,
        on_change: Callable[[StateChange, str], None],
    ) -> Engine:
        """Load a prepared model as soon as the memory budget allows it.

        If this raises or is cancelled, the caller must release the resources of `loaded_model`. `on_change` is called
        on the model's thread when the model crashes, recovers or fails.
        """
        entry, started = loaded_model.entry, time.monotonic()
        files = prepared.backend, prepared.size, entry.spec.precision
        await budget.reserve(
            loaded_model, entry.measured_bytes or minimum_bytes(*files), entry.measured_bytes or expected_bytes(*files)
        )
        backend = ReloadableBackend(self._manager.preparer, entry.spec, snapshot, self._cancel, prepared)
        engine = Engine(entry.spec, backend.open, self._config, self._executor, on_change)
        await engine.start()
        entry.measured_bytes = engine.memory_bytes
        try:
            budget.check_fits(engine.memory_bytes)
            check_input_types(entry.spec, engine.description)
        except LoadError:
            await run_in_daemon_thread(f"stop-{entry.spec.alias}", engine.stop)
            raise
        _log_ready(engine, snapshot, time.monotonic() - started)
        return engine

    async def can_load_meanwhile(self, entry: ModelEntry, snapshot: Snapshot) -> bool:
        """Return whether the model will be compiled, and torch can serve it until then."""
        preparer = self._manager.preparer
        return await run_in_daemon_thread(
            f"look-{entry.spec.alias}", lambda: preparer.is_compiled_later(entry.spec, snapshot)
        )

    async def load_meanwhile(
        self,
        loaded_model: LoadedModel,
        snapshot: Snapshot,
        budget: MemoryBudget,
        cancel: CancelToken,
        on_change: Callable[[StateChange, str], None],
    ) -> Engine:
        """Load a model with torch in a process of its own; LoadError if there is no room for it."""
        entry, started = loaded_model.entry, time.monotonic()
        preparer = self._manager.preparer

        def load() -> Backend:
            return preparer.load_interim(entry.spec, snapshot, cancel)

        budget.reserve_free(loaded_model, interim_bytes(snapshot.size))
        # A process that ends again is not replaced for long, because the compiler ends soon.
        timings = replace(self._config.timings, restart_pauses_s=(0.0,))
        engine = Engine(entry.spec, load, replace(self._config, timings=timings), self._executor, on_change)
        await engine.start()
        _log_ready(engine, snapshot, time.monotonic() - started)
        return engine

    def _fetch(self, entry: ModelEntry, on_progress: OnProgress) -> tuple[Snapshot, FileLock]:
        with ProgressReporter("log") as report:

            def on_both(progress: Progress) -> None:
                on_progress(progress)
                report(progress)

            try:
                if entry.given_snapshot is not None:
                    return entry.given_snapshot, self._manager.hold(entry.given_snapshot)
                return self._manager.acquire(
                    entry.spec, offline=entry.on_demand, on_progress=on_both, cancel=self._cancel
                )
            except HubError as error:
                if not entry.on_demand:
                    raise
                name = entry.spec.name
                raise NotCachedError(
                    f"{name} was served from disk, and its files are no longer complete there. `emb-provider pull {name}` "
                    "downloads them again."
                ) from error

    def _prepare(self, entry: ModelEntry, snapshot: Snapshot, on_progress: OnProgress) -> PreparedBackend:
        preparer = self._manager.preparer
        if preparer.allows_code(entry.spec, snapshot):
            logger.warning(
                "model %s: trust_remote_code is on: code from %s at revision %s may run in this process",
                entry.spec.alias, snapshot.repository, snapshot.revision,
            )  # fmt: skip
        # Of a model that is no longer served, the compiled form is of no use.
        cancel = CancelToken(lambda: self._cancel.is_cancelled or entry.removed)
        with ProgressReporter("log") as report:

            def on_both(progress: Progress) -> None:
                on_progress(progress)
                report(progress)

            return preparer.prepare(entry.spec, snapshot, on_progress=on_both, cancel=cancel)


def _log_ready(engine: Engine, snapshot: Snapshot, took_s: float) -> None:
    description = engine.description
    alias = engine.spec.alias
    for note in description.notes:
        logger.log(logging.WARNING if is_warning(note) else logging.INFO, "model %s: %s", alias, note)
    kind = f"{description.dimension}-dim" if description.kind == "dense" else description.kind
    logger.info(
        "model %s is ready: %s %s, %s, %.1f s",
        alias, kind, description.precision, format_size(engine.memory_bytes), took_s,
    )  # fmt: skip
    logger.debug(
        "model %s: %s at %s from %s, %s on %s, max %d tokens, %s pooling, %s",
        alias, snapshot.repository, snapshot.revision, snapshot.hub, description.backend, description.device,
        description.max_length, description.pooling, _format_fidelity(description),
    )  # fmt: skip


def _format_fidelity(description: ModelDescription) -> str:
    fidelity = description.fidelity
    if fidelity is None:
        return "the reference itself" if description.precision == "fp32" else "fidelity not measured"
    parts = []
    if fidelity.min_cosine is not None and fidelity.mean_cosine is not None:
        parts = [f"cosine to fp32 min {format_cosine(fidelity.min_cosine)}, mean {format_cosine(fidelity.mean_cosine)}"]
    if fidelity.top10_overlap is not None:
        parts.append(f"{100 * fidelity.top10_overlap:.1f} % of neighbors kept")
    if fidelity.spearman is not None:
        parts.append(f"Spearman {format_cosine(fidelity.spearman)}")
    others = {name: value for name, value in fidelity.agreement.items() if name != "dense"}
    parts += [f"agreement of {name} {format_cosine(value)}" for name, value in others.items()]
    return f"{', '.join(parts)} over {fidelity.texts} texts"
