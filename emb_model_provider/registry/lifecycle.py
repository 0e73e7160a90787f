"""Loads, unloads and watches models, and tracks their states. Everything here is used on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from emb_model_provider.backends.memory_estimate import expected_bytes
from emb_model_provider.concurrency import run_in_daemon_thread
from emb_model_provider.errors import (
    LoadError,
    ModelNotReadyError,
    OperationCancelledError,
    ProviderError,
    ThreadLimitError,
)
from emb_model_provider.fidelity.compare import AccuracyError
from emb_model_provider.formatting import describe_error
from emb_model_provider.model_resolver import hidden_repository_note, resolve_source
from emb_model_provider.progress import CancelToken
from emb_model_provider.registry.loader import Loader
from emb_model_provider.registry.memory_budget import MemoryBudget
from emb_model_provider.registry.model_entry import LoadedModel, State
from emb_model_provider.serving.config import EngineConfig
from emb_model_provider.settings import MemorySettings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterable
    from concurrent.futures import Executor

    from emb_model_provider.artifacts.prepare import PreparedBackend
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.progress import OnProgress, Progress
    from emb_model_provider.registry.model_entry import ModelEntry
    from emb_model_provider.serving.engine import Engine
    from emb_model_provider.serving.model_thread import StateChange
    from emb_model_provider.snapshots.snapshot import Snapshot

T = TypeVar("T")

logger = logging.getLogger(__name__)

_STOPPING_RETRY_AFTER_S = 5.0
_CHECK_EVERY_S = 1.0


async def no_workers() -> None:
    """There are no other workers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryConfig(EngineConfig):
    """Configuration of a registry and its engines."""

    memory: MemorySettings = field(default_factory=MemorySettings)
    torch_while_compiling: bool = False
    """Whether torch runs a model in a process of its own while it is compiled."""
    default_memory_bytes: int | None = None
    """Without limits in the settings, models are evicted if all together take more than this."""
    wait_for_workers: Callable[[], Awaitable[None]] = no_workers
    """Waits until the other workers of the service have unloaded the models that this one has unloaded."""


class Lifecycle:
    """Loads and unloads models, and tracks their states."""

    def __init__(self, manager: ModelManager, config: RegistryConfig, executor: Executor) -> None:
        self.abandoned: dict[Engine, str] = {}
        """Engines that hang and could not be stopped, with their aliases."""
        self._cancel = CancelToken()
        """Cancelled when the service shuts down."""
        self._loader = Loader(manager, config, executor, self._cancel)
        self._budget = MemoryBudget(config.memory, self.begin_unloading, config.default_memory_bytes)
        self._retiring: set[LoadedModel] = set()
        """Models whose compiled forms have taken over, and that still answer requests."""
        self._watchdog_s = config.watchdog_s
        self._stop_s = config.timings.stop_s
        self._torch_while_compiling = config.torch_while_compiling
        self._tasks: set[asyncio.Task[Any]] = set()
        self.lost_device = ""
        """Why a GPU can only be used again by another process; empty if none was lost."""

    async def ensure_loaded(self, entry: ModelEntry) -> LoadedModel:
        """Load the model if necessary, and return it with its reference count incremented.

        The caller must call `release_ref` on it.

        Raises:
            HubError, LoadError: The model cannot be loaded.
            ModelNotReadyError: The service is shutting down, or the model was removed.
        """
        while entry.unloading is not None and entry.is_unloading:
            await asyncio.wait([entry.unloading])
        if self._cancel.is_cancelled or entry.removed:
            raise self._unavailable(entry)
        loaded_model = self.begin_loading(entry)
        loaded_model.ref_count += 1
        try:
            # asyncio.wait, because the load is shared: cancelling one caller must not cancel it for the others.
            await asyncio.wait([loaded_model.loading])
            self._raise_load_error(loaded_model)
        except BaseException:
            loaded_model.release_ref()
            raise
        return loaded_model

    def begin_loading(self, entry: ModelEntry) -> LoadedModel:
        """Return the loaded model of an entry, starting to load it if necessary."""
        loaded_model = entry.loaded_model
        if loaded_model is None:
            loaded_model = entry.loaded_model = LoadedModel(entry)
            entry.state, entry.error = State.DOWNLOADING, None
            loaded_model.loading = self._create_task(self._load(loaded_model))
        return loaded_model

    async def unload(self, entry: ModelEntry, reason: str) -> None:
        """Unload a model after its requests are answered. If it is being loaded, wait for the load first."""
        if entry.loaded_model is not None or entry.is_unloading:
            await asyncio.wait([self.begin_unloading(entry, reason)])
        elif entry.state is State.FAILED:
            # The model is not in memory. Resetting the state lets the next request load it without a delay.
            entry.state, entry.error, entry.unload_reason = State.UNLOADED, None, reason

    def begin_unloading(self, entry: ModelEntry, reason: str) -> asyncio.Task[None]:
        """Start to unload a model, or return the task that already does so. Later requests wait for its end."""
        if entry.unloading is None or not entry.is_unloading:
            entry.unloading = self._create_task(self._unload(entry, reason))
        return entry.unloading

    async def stop(self) -> None:
        """Accept no further requests, answer the accepted ones, and unload all models."""
        self._cancel.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        remaining = [*self._budget.loaded, *self._retiring]
        for loaded_model in remaining:
            loaded_model.entry.loaded_model = None
            loaded_model.entry.state = State.UNLOADING
        await asyncio.gather(*(self._stop_engine(loaded_model, self._stop_s) for loaded_model in remaining))

    # --- loading --------------------------------------------------------------------------------------

    async def _load(self, loaded_model: LoadedModel) -> None:
        entry = loaded_model.entry
        alias = entry.spec.alias
        try:
            loaded_model.engine = await self._start_engine(loaded_model)
        except asyncio.CancelledError:
            self._release(loaded_model, State.UNLOADED)
            raise
        except BaseException as error:  # a panic of a library written in Rust is not an Exception
            if isinstance(error, OperationCancelledError) and (entry.removed or self._cancel.is_cancelled):
                self._release(loaded_model, State.UNLOADED)
                raise self._unavailable(entry) from None
            self._release(loaded_model, State.FAILED)
            entry.error = describe_error(error)
            if isinstance(error, LoadError) and resolve_source(entry.spec) == "local":
                entry.error += hidden_repository_note(entry.spec)
            if isinstance(error, ProviderError):
                logger.error("model %s could not be loaded: %s", alias, error)  # noqa: TRY400 - the message is enough
                raise
            logger.exception("model %s could not be loaded", alias)
            raise LoadError(entry.error) from error
        self._mark_ready(loaded_model)

    def _mark_ready(self, loaded_model: LoadedModel) -> None:
        entry = loaded_model.entry
        entry.state, entry.unload_reason = State.READY, None
        if not loaded_model.is_interim:
            entry.progress, entry.waits_for_compiler = None, False
        entry.loaded_at = time.time()
        entry.created = int(entry.loaded_at)
        loaded_model.since = time.monotonic()
        if self._budget.is_exceeded:
            self._create_task(self._budget.rebalance(loaded_model))

    async def _start_engine(self, loaded_model: LoadedModel) -> Engine:
        """Load a model; if it has to be compiled first, with torch in the meantime."""
        entry, loader = loaded_model.entry, self._loader
        on_progress = self._progress_callback(loaded_model)
        snapshot = await loader.fetch(loaded_model, on_progress)
        entry.progress = None
        entry.state = State.LOADING
        can_use_torch = self._torch_while_compiling and not entry.waits_for_compiler
        if not can_use_torch or not await loader.can_load_meanwhile(entry, snapshot):
            prepared = await loader.prepare(entry, snapshot, on_progress)
            entry.state, entry.progress = State.LOADING, None
            return await self._load_prepared(loaded_model, snapshot, prepared)
        preparing = self._create_task(loader.prepare(entry, snapshot, on_progress))
        stop_torch = CancelToken(lambda: self._cancel.is_cancelled)
        torch = self._create_task(
            loader.load_meanwhile(loaded_model, snapshot, self._budget, stop_torch, self._state_callback(loaded_model))
        )
        try:
            await asyncio.wait({preparing, torch}, return_when=asyncio.FIRST_COMPLETED)
            if not preparing.done() and torch.exception() is not None:
                self._budget.loaded.discard(loaded_model)
                logger.info(
                    "model %s: torch does not serve it while it is compiled: %s", entry.spec.alias, torch.exception()
                )
                await asyncio.wait({preparing})
            if not preparing.done():
                loaded_model.is_interim = True
                self._create_task(self._take_over(loaded_model, snapshot, preparing))
                return torch.result()
        except BaseException:
            preparing.cancel()
            stop_torch.cancel()
            raise
        # The compiler was faster, or torch cannot serve the model.
        stop_torch.cancel()
        await asyncio.wait({torch})
        if torch.exception() is None:
            await run_in_daemon_thread(f"stop-{entry.spec.alias}", torch.result().stop)
        self._budget.loaded.discard(loaded_model)
        entry.state, entry.progress = State.LOADING, None
        return await self._load_prepared(loaded_model, snapshot, preparing.result())

    async def _load_prepared(self, loaded_model: LoadedModel, snapshot: Snapshot, prepared: PreparedBackend) -> Engine:
        return await self._loader.load(
            loaded_model, snapshot, prepared, self._budget, self._state_callback(loaded_model)
        )

    async def _take_over(
        self, interim: LoadedModel, snapshot: Snapshot, preparing: asyncio.Task[PreparedBackend]
    ) -> None:
        """Replace a model that torch serves as soon as it is compiled. Requests in progress end with torch."""
        entry = interim.entry
        try:
            await asyncio.wait({preparing})
            if entry.loaded_model is not interim:  # it was unloaded; its next load finds the compiled form
                return
            prepared = preparing.result()
            expected = expected_bytes(prepared.backend, prepared.size, entry.spec.precision)
            if not self._budget.fits_beside(interim, expected):
                # Requests wait while the compiled form is loaded.
                await asyncio.wait([self.begin_unloading(entry, "compiled")])
                if not (entry.removed or self._cancel.is_cancelled):
                    self.begin_loading(entry)
                return
            replacement = LoadedModel(entry)
            replacement.loading = asyncio.current_task()  # type: ignore[assignment]  # of this coroutine
            try:
                replacement.engine = await self._load_prepared(replacement, snapshot, prepared)
            except BaseException:
                self._budget.loaded.discard(replacement)
                raise
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # noqa: BLE001 - a panic of a library written in Rust is not an Exception
            self._keep_torch(interim, error)
            return
        if entry.loaded_model is not interim:
            await self._stop_engine(replacement, self._stop_s)
            return
        replacement.snapshot_lock, interim.snapshot_lock = interim.snapshot_lock, None
        entry.loaded_model = replacement
        self._mark_ready(replacement)
        self._retire(interim)

    def _keep_torch(self, interim: LoadedModel, error: BaseException) -> None:
        """Let torch serve a model that could not be compiled, unless its requested precision is not accurate enough."""
        entry = interim.entry
        if entry.loaded_model is not interim or self._cancel.is_cancelled:
            return
        entry.progress, entry.error = None, f"it could not be compiled: {describe_error(error)}"
        if not isinstance(error, AccuracyError):
            logger.warning("model %s: %s Torch serves it in a process of its own.", entry.spec.alias, entry.error)
            return
        logger.error("model %s: %s", entry.spec.alias, entry.error)
        entry.loaded_model, entry.state, entry.failed_at = None, State.FAILED, time.monotonic()
        self._retire(interim)

    def _retire(self, interim: LoadedModel) -> None:
        """Stop a model that new requests no longer use after its requests are answered."""
        self._budget.loaded.discard(interim)
        self._retiring.add(interim)

        async def stop() -> None:
            await interim.wait_idle()
            await self._stop_engine(interim, self._stop_s)
            self._retiring.discard(interim)

        self._create_task(stop())

    def _progress_callback(self, loaded_model: LoadedModel) -> OnProgress:
        """Return a thread-safe callback for the progress of a load."""
        loop = asyncio.get_running_loop()

        def on_progress(progress: Progress) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._on_progress, loaded_model, progress)

        return on_progress

    def _on_progress(self, loaded_model: LoadedModel, progress: Progress) -> None:
        entry = loaded_model.entry
        if entry.loaded_model is not loaded_model:
            return
        is_compiling = progress.phase in ("compile", "compare")
        if loaded_model.engine is None:
            entry.state = State.COMPILING if is_compiling else State.DOWNLOADING
        if loaded_model.engine is None or loaded_model.is_interim:
            entry.progress = progress

    def _raise_load_error(self, loaded_model: LoadedModel) -> None:
        if loaded_model.loading.cancelled():
            raise self._unavailable(loaded_model.entry)
        loaded_model.loading.result()

    def _state_callback(self, loaded_model: LoadedModel) -> Callable[[StateChange, str], None]:
        """Return a thread-safe callback for the model's state after a crash."""
        loop = asyncio.get_running_loop()

        def on_change(change: StateChange, reason: str) -> None:
            # The loop may be closed, because the thread of a model that hangs outlives it.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._on_state_change, loaded_model, change, reason)

        return on_change

    def _on_state_change(self, loaded_model: LoadedModel, change: StateChange, reason: str) -> None:
        entry = loaded_model.entry
        if change == "device lost":
            self.lost_device = f"model {entry.spec.alias} failed: {reason}"
        if self._cancel.is_cancelled or entry.loaded_model is not loaded_model:
            return
        entry.error = reason or None
        if change == "restarting":
            entry.state = State.LOADING
            entry.restarts += 1
        elif change == "running":
            entry.state = State.READY
        elif loaded_model.is_interim:
            entry.waits_for_compiler = True
            self._release(loaded_model, State.UNLOADED)
            self.begin_loading(entry)
        else:
            # As after a first load that failed, a later request can load the model again.
            self._release(loaded_model, State.FAILED)

    # --- unloading ------------------------------------------------------------------------------------

    async def _unload(self, entry: ModelEntry, reason: str) -> None:
        loaded_model = entry.loaded_model
        if loaded_model is None:
            return
        await asyncio.wait([loaded_model.loading])
        engine = loaded_model.engine
        if entry.loaded_model is not loaded_model or engine is None:
            return  # the load failed, or the model failed meanwhile
        entry.loaded_model = None
        entry.state, entry.error, entry.unload_reason = State.UNLOADING, None, reason
        await loaded_model.wait_idle()
        # Waiting for a batch that hangs is pointless. Any other ends within the watchdog's limit.
        timeout_s = self._stop_s if engine.hang_report else max(self._stop_s, self._watchdog_s)
        await self._stop_engine(loaded_model, timeout_s)
        entry.unloads[reason] += 1
        logger.info("model %s is unloaded: %s", entry.spec.alias, reason)

    async def _stop_engine(self, loaded_model: LoadedModel, timeout_s: float) -> None:
        alias, engine = loaded_model.entry.spec.alias, loaded_model.engine
        if engine is not None:
            try:
                is_stopped = await run_in_daemon_thread(f"stop-{alias}", lambda: engine.stop(timeout_s))
            except ThreadLimitError as error:
                logger.warning("model %s frees its memory when its last batch has ended: %s", alias, error)
                engine.stop(0)  # which waits for nothing
            except Exception:
                logger.exception("model %s could not be stopped", alias)
            else:
                if not is_stopped:
                    logger.warning(
                        "model %s hangs and could not be stopped: its memory is freed when the process ends", alias
                    )
                    self.abandoned[engine] = alias
        self._release(loaded_model, State.UNLOADED)

    def _release(self, loaded_model: LoadedModel, state: State) -> None:
        """Release memory budget and snapshot of a model that is no longer loaded, and set its state."""
        entry = loaded_model.entry
        self._budget.loaded.discard(loaded_model)
        if loaded_model.snapshot_lock is not None:
            loaded_model.snapshot_lock.release()
        if entry.loaded_model not in (None, loaded_model) or entry.state is State.FAILED:
            return  # replaced by its compiled form, or by the failure of that
        entry.loaded_model = entry.progress = None
        entry.state = state
        if state is State.FAILED:
            entry.failed_at = time.monotonic()

    def _create_task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task_done)
        return task

    def _on_task_done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Retrieved here, because asyncio logs the error of a task that is not awaited.
            task.exception()

    def _unavailable(self, entry: ModelEntry) -> ModelNotReadyError:
        unserved = f"The model `{entry.spec.alias}` is no longer served"
        reason = "The service is shutting down" if self._cancel.is_cancelled else unserved
        return ModelNotReadyError(f"{reason}. Try again later.", retry_after_s=_STOPPING_RETRY_AFTER_S)


class Watchdog:
    """Checks the models periodically: reports those that hang, and unloads those that are idle."""

    def __init__(
        self, entries: Callable[[], Iterable[ModelEntry]], lifecycle: Lifecycle, config: RegistryConfig
    ) -> None:
        self._entries = entries
        self._lifecycle = lifecycle
        self._watchdog_s = config.watchdog_s
        self._idle_unload_s = config.memory.idle_unload_s
        self._hung_since: dict[Engine, float] = {}

    async def run(self, on_hung: Callable[[str], None] | None) -> None:
        """Watch the models until cancelled.

        `on_hung` is called when one has hung for `watchdog_s` after it was reported, or when a GPU was lost.
        """
        pause_s = min(_CHECK_EVERY_S, self._watchdog_s / 2, (self._idle_unload_s or _CHECK_EVERY_S) / 2)
        abandoned = self._lifecycle.abandoned
        while True:
            await asyncio.sleep(pause_s)
            for engine in [engine for engine in abandoned if not engine.hang_report]:
                del abandoned[engine]
            engines = {entry.engine: entry.spec.alias for entry in self._entries() if entry.engine is not None}
            engines |= abandoned
            self._hung_since = {engine: since for engine, since in self._hung_since.items() if engine in engines}
            for engine, alias in engines.items():
                self._check_for_hang(engine, alias, on_hung)
            if on_hung is not None and self._lifecycle.lost_device:
                on_hung(self._lifecycle.lost_device)
            if self._idle_unload_s is not None:
                self._unload_idle(self._idle_unload_s)

    def _check_for_hang(self, engine: Engine, alias: str, on_hung: Callable[[str], None] | None) -> None:
        hang_report = engine.hang_report
        now = time.monotonic()
        if not hang_report:
            if self._hung_since.pop(engine, None) is not None:
                logger.warning("model %s has recovered", alias)
            return
        if engine not in self._hung_since:
            self._hung_since[engine] = now
            logger.error("model %s hangs: %s", alias, hang_report)
        if on_hung is not None and now - self._hung_since[engine] >= self._watchdog_s:
            on_hung(f"model {alias} hangs: {hang_report}")

    def _unload_idle(self, idle_s: float) -> None:
        now = time.monotonic()
        for entry in self._entries():
            loaded_model = entry.loaded_model
            if entry.state is not State.READY or loaded_model is None or loaded_model.ref_count:
                continue
            if now - loaded_model.last_used_at >= idle_s:
                self._lifecycle.begin_unloading(entry, "idle")
