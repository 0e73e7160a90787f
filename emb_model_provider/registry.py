"""Which models are served, under which names, and in which state."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from emb_model_provider.compile.floors import shown_cosine
from emb_model_provider.compile.prepare import PreparedBackend, prepare_backend
from emb_model_provider.errors import ModelNotFoundError, ModelNotReadyError, ProviderError
from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.hubs.progress import ProgressReporter
from emb_model_provider.serving.engine import Engine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from emb_model_provider.backends.base import Backend, ModelDescription
    from emb_model_provider.hubs.snapshot import Snapshot
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.serving.jobs import BatchRecord
    from emb_model_provider.serving.worker import Change
    from emb_model_provider.settings import (
        BatchSettings,
        FidelitySettings,
        HubSettings,
        LimitSettings,
        ModelSettings,
        TrustSettings,
    )

logger = logging.getLogger(__name__)

_LOADING_RETRY_AFTER_S = 5.0
_FAILED_RETRY_AFTER_S = 30.0
"""How soon after a failed load a request may try again: a hub that was down comes back."""
_TOKENIZER_THREADS = 2
_WATCH_EVERY_S = 1.0
_STOP_S = 5.0
"""How long a model has for what still runs when all requests are answered or given up."""


class State(StrEnum):
    """Where a model is on its way from a name to an engine."""

    UNLOADED = "unloaded"
    DOWNLOADING = "downloading"
    COMPILING = "compiling"
    LOADING = "loading"
    READY = "ready"
    HUNG = "hung"
    FAILED = "failed"
    UNLOADING = "unloading"


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """A served model as it is now."""

    spec: ModelSpec
    state: State
    preload: bool
    created: int
    """Unix time, seconds: when the model was loaded here, or when the service started."""
    error: str | None
    """Why it failed, hangs, or is loaded anew, in one line."""
    restarts: int
    """How often it broke down and was loaded anew."""
    snapshot: Snapshot | None
    description: ModelDescription | None
    waiting_inputs: int
    waiting_tokens: int


class _Slot:
    """A configured model, loaded or not."""

    def __init__(self, spec: ModelSpec, *, preload: bool) -> None:
        self.spec = spec
        self.preload = preload
        self.created = int(time.time())
        self.state = State.UNLOADED
        self.engine: Engine | None = None
        self.snapshot: Snapshot | None = None
        self.loading: asyncio.Task[Engine] | None = None
        self.error: str | None = None
        self.failed_at = 0.0
        self.restarts = 0
        self.hung_since: float | None = None

    def status(self) -> ModelStatus:
        engine = self.engine
        hung = engine.hung if engine is not None and self.state is State.READY else ""
        return ModelStatus(
            spec=self.spec,
            state=State.HUNG if hung else self.state,
            preload=self.preload,
            created=self.created,
            error=hung or self.error,
            restarts=self.restarts,
            snapshot=self.snapshot,
            description=engine.description if engine is not None else None,
            waiting_inputs=engine.waiting_inputs if engine is not None else 0,
            waiting_tokens=engine.waiting_tokens if engine is not None else 0,
        )


class Registry:
    """The models of one service. Used on one event loop."""

    def __init__(
        self,
        models: ModelSettings,
        *,
        hubs: HubSettings,
        trust: TrustSettings,
        batching: BatchSettings,
        limits: LimitSettings,
        max_artifact_bytes: int,
        on_batch: Callable[[BatchRecord], None],
        fidelity: FidelitySettings | None = None,
        watchdog_s: float = 60.0,
    ) -> None:
        self._max_artifact_bytes = max_artifact_bytes
        self._fidelity = fidelity
        self._hubs = hubs
        self._trust = trust
        self._batching = batching
        self._limits = limits
        self._on_batch = on_batch
        self._watchdog_s = watchdog_s
        self._slots = {spec.alias: _Slot(spec, preload=spec.alias in models.preload) for spec in models.specs}
        self._default = models.specs[0].alias
        self._other_names = _other_names(models.specs)
        self._executor = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="tokenize")
        self._compiling = threading.Lock()
        self._stopping = False

    # --- looking --------------------------------------------------------------------------------------

    @property
    def default_alias(self) -> str:
        """The model of a request that names none."""
        return self._default

    def alias_of(self, name: str) -> str:
        """Return the alias that `name` means: an alias, a model's id (its first alias), or a unique last part.

        Raises: ModelNotFoundError.
        """
        if name in self._slots:
            return name
        alias = self._other_names.get(name)
        if alias is None:
            raise ModelNotFoundError(name[:200], ", ".join(self._slots))
        return alias

    def status(self, name: str) -> ModelStatus:
        """Raises: ModelNotFoundError."""
        return self._slots[self.alias_of(name)].status()

    def statuses(self) -> list[ModelStatus]:
        """Return all models, in the order of the settings."""
        return [slot.status() for slot in self._slots.values()]

    # --- using ----------------------------------------------------------------------------------------

    async def get(self, name: str) -> Engine:
        """Return the engine of a model, loading it first where that has not happened yet.

        However many callers wait, the model is loaded once.

        Raises: ModelNotFoundError; ModelNotReadyError while stopping, where loading takes longer than a
        request may, or with the reason where loading failed.
        """
        slot = self._slots[self.alias_of(name)]
        if slot.engine is not None and not self._stopping:
            return slot.engine
        return await self._loaded(slot)

    async def preload(self) -> bool:
        """Load all models that are to be loaded at the start; return whether any model can answer or may later."""
        slots = [slot for slot in self._slots.values() if slot.preload]
        await asyncio.gather(*(self._begin_loading(slot) for slot in slots), return_exceptions=True)
        return any(slot.state is not State.FAILED for slot in self._slots.values())

    async def watch(self, on_hung: Callable[[str], None] | None = None) -> None:
        """Look at all models again and again, and log which hang. Ends by being cancelled.

        `on_hung` is called with what to say once a model has hung for the watchdog's time after it was noticed:
        nothing in this process can end a computation that does not end.
        """
        while True:
            await asyncio.sleep(min(_WATCH_EVERY_S, self._watchdog_s / 2))
            for slot in self._slots.values():
                self._look_at(slot, on_hung)

    def _look_at(self, slot: _Slot, on_hung: Callable[[str], None] | None) -> None:
        hung = slot.engine.hung if slot.engine is not None else ""
        now = time.monotonic()
        if not hung:
            if slot.hung_since is not None:
                logger.warning("model %s hangs no more", slot.spec.alias)
            slot.hung_since = None
            return
        if slot.hung_since is None:
            slot.hung_since = now
            logger.error("model %s hangs: %s", slot.spec.alias, hung)
        if on_hung is not None and now - slot.hung_since >= self._watchdog_s:
            on_hung(f"model {slot.spec.alias} hangs: {hung}")

    async def stop(self) -> None:
        """Let no more requests in, finish those that were accepted, free all models."""
        self._stopping = True
        loading = [slot.loading for slot in self._slots.values() if slot.loading is not None]
        for task in loading:
            task.cancel()
        await asyncio.gather(*loading, return_exceptions=True)
        running = [slot for slot in self._slots.values() if slot.engine is not None]
        for slot in running:
            slot.state = State.UNLOADING
        in_order = await asyncio.gather(
            *(asyncio.to_thread(slot.engine.stop, _STOP_S) for slot in running if slot.engine is not None)
        )
        for slot, ended in zip(running, in_order, strict=True):
            if not ended:
                logger.warning("model %s did not come to an end; it ends with the process", slot.spec.alias)
            slot.engine, slot.state = None, State.UNLOADED
        self._executor.shutdown(wait=False, cancel_futures=True)

    # --- loading --------------------------------------------------------------------------------------

    async def _loaded(self, slot: _Slot) -> Engine:
        if self._stopping:
            raise ModelNotReadyError(
                "The service is shutting down: ask again later.", retry_after_s=_LOADING_RETRY_AFTER_S
            )
        wait_s = slot.failed_at + _FAILED_RETRY_AFTER_S - time.monotonic()
        if slot.state is State.FAILED and wait_s > 0:
            raise self._failure(slot, wait_s)
        loading = self._begin_loading(slot)
        try:
            # Shielded: the load is shared, so one caller that gives up must not end it for the others.
            return await asyncio.wait_for(asyncio.shield(loading), self._limits.request_timeout_s)
        except TimeoutError:
            raise ModelNotReadyError(
                f"The model `{slot.spec.alias}` is still {slot.state}: ask again later.",
                retry_after_s=_LOADING_RETRY_AFTER_S,
            ) from None
        except ProviderError:
            raise self._failure(slot, _FAILED_RETRY_AFTER_S) from None

    @staticmethod
    def _failure(slot: _Slot, retry_after_s: float) -> ModelNotReadyError:
        return ModelNotReadyError(
            f"The model `{slot.spec.alias}` could not be loaded: {slot.error}", retry_after_s=retry_after_s
        )

    def _begin_loading(self, slot: _Slot) -> asyncio.Task[Engine]:
        if slot.loading is None:
            slot.loading = asyncio.create_task(self._load(slot))
            # Fetched here, so that a load nobody waits for any more does not end as "never retrieved".
            slot.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return slot.loading

    async def _load(self, slot: _Slot) -> Engine:
        spec = slot.spec
        started = time.monotonic()
        try:
            slot.error = None
            slot.state = State.DOWNLOADING
            logger.info("loading model %s", spec.alias)
            snapshot = await asyncio.to_thread(_fetch, spec, self._hubs)
            slot.snapshot = snapshot
            slot.state = State.LOADING
            prepared: PreparedBackend | None = await asyncio.to_thread(self._prepare, slot, snapshot)
            slot.state = State.LOADING

            def load() -> Backend:
                nonlocal prepared
                # Prepared again for every later load: an artifact may be gone by then.
                ready = prepared or self._prepare(slot, snapshot)
                prepared = None
                return ready.load()

            engine = await Engine.start(
                spec,
                load,
                batching=self._batching,
                limits=self._limits,
                executor=self._executor,
                on_batch=self._on_batch,
                watchdog_s=self._watchdog_s,
                on_change=self._telling(slot),
            )
        except asyncio.CancelledError:
            slot.state, slot.loading = State.UNLOADED, None
            raise
        except Exception as error:
            slot.state, slot.loading, slot.failed_at = State.FAILED, None, time.monotonic()
            if isinstance(error, ProviderError):
                slot.error = error.message
                logger.error("model %s could not be loaded: %s", spec.alias, error)  # noqa: TRY400 - the message says it all
                raise
            slot.error = (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}"
            )
            logger.exception("model %s could not be loaded", spec.alias)
            raise ModelNotReadyError(slot.error, retry_after_s=_FAILED_RETRY_AFTER_S) from error
        slot.engine, slot.state, slot.loading = engine, State.READY, None
        slot.created = int(time.time())
        _log_loaded(engine, snapshot, time.monotonic() - started)
        return engine

    def _telling(self, slot: _Slot) -> Callable[[Change, str], None]:
        """Return what a model's threads may call when it breaks down, comes back or is given up."""
        loop = asyncio.get_running_loop()

        def changed(change: Change, reason: str) -> None:
            # A loop that is closed serves nobody any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._change, slot, change, reason)

        return changed

    def _change(self, slot: _Slot, change: Change, reason: str) -> None:
        if self._stopping:
            return
        slot.error = reason or None
        if change == "restarting":
            slot.state = State.LOADING
            slot.restarts += 1
        elif change == "running":
            slot.state = State.READY
        else:
            # A request after a while may try from the beginning, as after a first load that failed.
            slot.engine, slot.state, slot.failed_at = None, State.FAILED, time.monotonic()

    def _prepare(self, slot: _Slot, snapshot: Snapshot) -> PreparedBackend:
        """Choose the slot's backend, compiling where that is needed. Blocks; runs on a thread of its own."""
        my_turn = False

        def begin_compiling() -> None:
            nonlocal my_turn
            slot.state = State.COMPILING
            # Compiling takes all processors: two at a time would each take more than twice as long.
            while not (my_turn := self._compiling.acquire(timeout=0.2)):
                if self._stopping:
                    raise InterruptedError("stopped while waiting to compile")

        try:
            return prepare_backend(
                slot.spec,
                snapshot,
                trust_remote_code=self._may_run_code(slot.spec, snapshot),
                cache_dir=self._hubs.cache_dir,
                max_cache_bytes=self._max_artifact_bytes,
                on_compiling=begin_compiling,
                stopped=lambda: self._stopping,
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


def _fetch(spec: ModelSpec, hubs: HubSettings) -> Snapshot:
    with ProgressReporter(terminal=sys.stderr) as report:
        return fetch_snapshot(spec, hubs, report)


def _log_loaded(engine: Engine, snapshot: Snapshot, took_s: float) -> None:
    description = engine.description
    for note in description.notes:
        logger.warning("model %s: %s", engine.spec.alias, note)
    logger.info(
        "model %s is ready: %s at %s from %s, %d dimensions, %d tokens, %s pooling, %s on %s (%s), %s, %.1f s",
        engine.spec.alias, snapshot.repository, snapshot.revision[:12], snapshot.hub, description.dimension,
        description.max_length, description.pooling, description.precision, description.device,
        description.backend, _fidelity_words(description), took_s,
    )  # fmt: skip


def _fidelity_words(description: ModelDescription) -> str:
    fidelity = description.fidelity
    if fidelity is None:
        return "the reference itself" if description.precision == "fp32" else "fidelity not measured"
    words = [
        f"cosine to fp32 {shown_cosine(fidelity.min_cosine)} or more, mean {shown_cosine(fidelity.mean_cosine)}"
    ]
    if fidelity.top10_overlap is not None:
        words.append(f"{100 * fidelity.top10_overlap:.1f} % of neighbours kept")
    if fidelity.spearman is not None:
        words.append(f"Spearman {shown_cosine(fidelity.spearman)}")
    return f"{', '.join(words)} over {fidelity.texts} texts"


def _other_names(specs: Sequence[ModelSpec]) -> dict[str, str]:
    """Map ids of models to the first alias that serves them, and last parts that mean just one model to its alias."""
    ids: dict[str, str] = {}
    last_parts: dict[str, set[str]] = {}
    for spec in specs:
        ids.setdefault(spec.name, spec.alias)
        for name in (spec.name, spec.alias):
            last_parts.setdefault(name.rstrip("/").rpartition("/")[2], set()).add(spec.alias)
    return {name: next(iter(aliases)) for name, aliases in last_parts.items() if len(aliases) == 1} | ids
