"""A model's way into memory and out of it: loads, unloads, breakdowns, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

from emb_model_provider.concurrency import run_in_daemon_thread
from emb_model_provider.errors import LoadError, ModelNotReadyError, ProviderError
from emb_model_provider.registry.memory_budget import MemoryBudget
from emb_model_provider.registry.model_entry import LoadedModel, State

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from emb_model_provider.registry.loader import Loader
    from emb_model_provider.registry.model_entry import ModelEntry
    from emb_model_provider.serving.engine import Engine
    from emb_model_provider.serving.model_thread import StateChange
    from emb_model_provider.settings import MemorySettings

logger = logging.getLogger(__name__)

_STOPPING_RETRY_AFTER_S = 5.0


class Lifecycle:
    """Loads and unloads models, and keeps each in its state. Used on one event loop."""

    def __init__(
        self,
        loader: Loader,
        residency: MemorySettings,
        *,
        watchdog_s: float,
        stop_s: float,
        on_abandoned: Callable[[str, Engine], None],
    ) -> None:
        """`on_abandoned` is told of an engine that was to stop and hangs, with its model's alias."""
        self.stopping = False
        self._loader = loader
        self._budget = MemoryBudget(residency, self.begin_unloading)
        self._watchdog_s = watchdog_s
        self._stop_s = stop_s
        self._on_abandoned = on_abandoned
        self._tasks: set[asyncio.Task[None]] = set()

    async def ensure_loaded(self, entry: ModelEntry) -> LoadedModel:
        """Return a model's stay once it is loaded, the caller counted as its user: `release_ref` it.

        Raises: HubError, LoadError; ModelNotReadyError while stopping, and where the model is to be forgotten.
        """
        while entry.unloading is not None and entry.is_unloading:
            await asyncio.wait([entry.unloading])
        if self.stopping or entry.removed:
            raise self._unavailable(entry)
        loaded_model = self.begin_loading(entry)
        loaded_model.ref_count += 1
        try:
            # The load is shared: one caller that gives up does not end it for the others.
            await asyncio.wait([loaded_model.loading])
            self._require_loaded(loaded_model)
        except BaseException:
            loaded_model.release_ref()
            raise
        return loaded_model

    def begin_loading(self, entry: ModelEntry) -> LoadedModel:
        """Return the present stay of a model, or a new one."""
        loaded_model = entry.loaded_model
        if loaded_model is None:
            loaded_model = entry.loaded_model = LoadedModel(entry)
            entry.state, entry.error = State.DOWNLOADING, None
            loaded_model.loading = self._run(self._load(loaded_model))
        return loaded_model

    def begin_unloading(self, entry: ModelEntry, reason: str) -> asyncio.Task[None]:
        """Return the unloading of a model that is under way, or begin it.

        Requests that come from now on wait for it, but for those that join a load that is under way.
        """
        if entry.unloading is None or not entry.is_unloading:
            entry.unloading = self._run(self._unload(entry, reason))
        return entry.unloading

    async def unload(self, entry: ModelEntry, reason: str) -> None:
        """Wait until a model is out of memory; a load that is under way is waited for, too."""
        if entry.loaded_model is not None or entry.is_unloading:
            await asyncio.wait([self.begin_unloading(entry, reason)])
        elif entry.state is State.FAILED:
            # It takes no memory. It counts as trouble no more, and the next request may try.
            entry.state, entry.error, entry.unload_reason = State.UNLOADED, None, reason

    async def stop(self) -> None:
        """Let no more requests in, finish those that were accepted, free all models."""
        self.stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        remaining = list(self._budget.loaded)
        for loaded_model in remaining:
            loaded_model.entry.loaded_model = None
            loaded_model.entry.state = State.UNLOADING
        await asyncio.gather(*(self._end(loaded_model, self._stop_s) for loaded_model in remaining))

    # --- in -------------------------------------------------------------------------------------------

    async def _load(self, loaded_model: LoadedModel) -> None:
        entry = loaded_model.entry
        alias = entry.spec.alias
        try:
            loaded_model.engine = await self._loader.load(
                loaded_model, self._budget, self._state_callback(loaded_model)
            )
        except asyncio.CancelledError:
            self._on_released(loaded_model, State.UNLOADED)
            raise
        except BaseException as error:  # such as a panic of a library written in Rust, which is no Exception
            self._on_released(loaded_model, State.FAILED)
            if isinstance(error, ProviderError):
                entry.error = error.message
                logger.error("model %s could not be loaded: %s", alias, error)  # noqa: TRY400 - the message says it all
                raise
            entry.error = (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}"
            )
            logger.exception("model %s could not be loaded", alias)
            raise LoadError(entry.error) from error
        entry.state, entry.unload_reason = State.READY, None
        entry.loaded_at = time.time()
        entry.created = int(entry.loaded_at)
        loaded_model.since = time.monotonic()
        if self._budget.is_exceeded:
            self._run(self._budget.rebalance(loaded_model))

    def _state_callback(self, loaded_model: LoadedModel) -> Callable[[StateChange, str], None]:
        """Return what a model's threads may call when it breaks down, comes back or is given up."""
        loop = asyncio.get_running_loop()

        def changed(change: StateChange, reason: str) -> None:
            # A loop that is closed serves nobody any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._on_state_change, loaded_model, change, reason)

        return changed

    def _on_state_change(self, loaded_model: LoadedModel, change: StateChange, reason: str) -> None:
        entry = loaded_model.entry
        if self.stopping or entry.loaded_model is not loaded_model:
            return
        entry.error = reason or None
        if change == "restarting":
            entry.state = State.LOADING
            entry.restarts += 1
        elif change == "running":
            entry.state = State.READY
        else:
            # A request after a while may try from the beginning, as after a first load that failed.
            self._on_released(loaded_model, State.FAILED)

    # --- out ------------------------------------------------------------------------------------------

    async def _unload(self, entry: ModelEntry, reason: str) -> None:
        loaded_model = entry.loaded_model
        if loaded_model is None:
            return
        await asyncio.wait([loaded_model.loading])
        engine = loaded_model.engine
        if entry.loaded_model is not loaded_model or engine is None:
            return  # it could not be loaded, or was given up meanwhile
        entry.loaded_model = None
        entry.state, entry.error, entry.unload_reason = State.UNLOADING, None, reason
        await loaded_model.wait_idle()
        # What hangs will hardly end within any time; what runs ends within that of a batch.
        await self._end(
            loaded_model, self._stop_s if engine.hang_report else max(self._stop_s, self._watchdog_s)
        )
        entry.unloads[reason] += 1
        logger.info("model %s is unloaded: %s", entry.spec.alias, reason)

    async def _end(self, loaded_model: LoadedModel, timeout_s: float) -> None:
        """Stop a model's engine, and give back what its stay took."""
        alias, engine = loaded_model.entry.spec.alias, loaded_model.engine
        if engine is not None:
            try:
                ended = await run_in_daemon_thread(f"stop-{alias}", lambda: engine.stop(timeout_s))
            except Exception:
                logger.exception("model %s was not stopped in good order", alias)
            else:
                if not ended:
                    logger.warning("model %s did not come to an end; it ends with the process", alias)
                    self._on_abandoned(alias, engine)
        self._on_released(loaded_model, State.UNLOADED)

    def _on_released(self, loaded_model: LoadedModel, state: State) -> None:
        entry = loaded_model.entry
        self._budget.loaded.discard(loaded_model)
        loaded_model.release_snapshot()
        entry.loaded_model = None
        entry.state = state
        if state is State.FAILED:
            entry.failed_at = time.monotonic()

    # --- odds and ends --------------------------------------------------------------------------------

    def _run(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            # Fetched here, so that a load nobody waits for any more does not end as "never retrieved".
            task.exception()

    def _require_loaded(self, loaded_model: LoadedModel) -> None:
        if loaded_model.loading.cancelled():
            raise self._unavailable(loaded_model.entry)
        loaded_model.loading.result()

    def _unavailable(self, entry: ModelEntry) -> ModelNotReadyError:
        what = "The service is shutting down" if self.stopping else f"`{entry.spec.alias}` is served no more"
        return ModelNotReadyError(f"{what}: ask again later.", retry_after_s=_STOPPING_RETRY_AFTER_S)
