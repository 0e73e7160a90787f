"""A model's way into memory and out of it: loads, unloads, breakdowns, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

from emb_model_provider.concurrency import in_thread
from emb_model_provider.errors import LoadError, ModelNotReadyError, ProviderError
from emb_model_provider.registry.memory_budget import Room
from emb_model_provider.registry.model_entry import Residence, State

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from emb_model_provider.registry.loader import Loader
    from emb_model_provider.registry.model_entry import Slot
    from emb_model_provider.serving.engine import Engine
    from emb_model_provider.serving.model_thread import Change
    from emb_model_provider.settings import ResidencySettings

logger = logging.getLogger(__name__)

_STOP_S = 5.0
"""How long a model has for what still runs when all requests are answered or given up."""
_STOPPING_RETRY_AFTER_S = 5.0


class Lifecycle:
    """Loads and unloads models, and keeps each in its state. Used on one event loop."""

    def __init__(
        self,
        loader: Loader,
        residency: ResidencySettings,
        *,
        watchdog_s: float,
        on_left_behind: Callable[[str, Engine], None],
    ) -> None:
        """`on_left_behind` is told of an engine that was to stop and hangs, with its model's alias."""
        self.stopping = False
        self._loader = loader
        self._room = Room(residency, self.begin_unloading)
        self._watchdog_s = watchdog_s
        self._on_left_behind = on_left_behind
        self._tasks: set[asyncio.Task[None]] = set()

    async def join(self, slot: Slot) -> Residence:
        """Return a model's stay once it is loaded, the caller counted as its user: `leave` it.

        Raises: HubError, LoadError; ModelNotReadyError while stopping, and where the model is to be forgotten.
        """
        while slot.unloading is not None and slot.is_unloading:
            await asyncio.wait([slot.unloading])
        if self.stopping or slot.forgotten:
            raise self._not_any_more(slot)
        residence = self.begin_loading(slot)
        residence.users += 1
        try:
            # The load is shared: one caller that gives up does not end it for the others.
            await asyncio.wait([residence.loading])
            self._require_loaded(residence)
        except BaseException:
            residence.leave()
            raise
        return residence

    def begin_loading(self, slot: Slot) -> Residence:
        """Return the present stay of a model, or a new one."""
        residence = slot.residence
        if residence is None:
            residence = slot.residence = Residence(slot)
            slot.state, slot.error = State.DOWNLOADING, None
            residence.loading = self._run(self._load(residence))
        return residence

    def begin_unloading(self, slot: Slot, because: str) -> asyncio.Task[None]:
        """Return the unloading of a model that is under way, or begin it.

        Requests that come from now on wait for it, but for those that join a load that is under way.
        """
        if slot.unloading is None or not slot.is_unloading:
            slot.unloading = self._run(self._unload(slot, because))
        return slot.unloading

    async def unload(self, slot: Slot, because: str) -> None:
        """Wait until a model is out of memory; a load that is under way is waited for, too."""
        if slot.residence is not None or slot.is_unloading:
            await asyncio.wait([self.begin_unloading(slot, because)])
        elif slot.state is State.FAILED:
            # It takes no memory. It counts as trouble no more, and the next request may try.
            slot.state, slot.error, slot.unloaded_because = State.UNLOADED, None, because

    async def stop(self) -> None:
        """Let no more requests in, finish those that were accepted, free all models."""
        self.stopping = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        remaining = list(self._room.residences)
        for residence in remaining:
            residence.slot.residence = None
            residence.slot.state = State.UNLOADING
        await asyncio.gather(*(self._end(residence, _STOP_S) for residence in remaining))

    # --- in -------------------------------------------------------------------------------------------

    async def _load(self, residence: Residence) -> None:
        slot = residence.slot
        alias = slot.spec.alias
        try:
            residence.engine = await self._loader.load(residence, self._room, self._telling(residence))
        except asyncio.CancelledError:
            self._gone(residence, State.UNLOADED)
            raise
        except BaseException as error:  # such as a panic of a library written in Rust, which is no Exception
            self._gone(residence, State.FAILED)
            if isinstance(error, ProviderError):
                slot.error = error.message
                logger.error("model %s could not be loaded: %s", alias, error)  # noqa: TRY400 - the message says it all
                raise
            slot.error = (
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}"
            )
            logger.exception("model %s could not be loaded", alias)
            raise LoadError(slot.error) from error
        slot.state, slot.unloaded_because = State.READY, None
        slot.loaded_at = time.time()
        slot.created = int(slot.loaded_at)
        residence.since = time.monotonic()
        if self._room.is_over:
            self._run(self._room.correct(residence))

    def _telling(self, residence: Residence) -> Callable[[Change, str], None]:
        """Return what a model's threads may call when it breaks down, comes back or is given up."""
        loop = asyncio.get_running_loop()

        def changed(change: Change, reason: str) -> None:
            # A loop that is closed serves nobody any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._change, residence, change, reason)

        return changed

    def _change(self, residence: Residence, change: Change, reason: str) -> None:
        slot = residence.slot
        if self.stopping or slot.residence is not residence:
            return
        slot.error = reason or None
        if change == "restarting":
            slot.state = State.LOADING
            slot.restarts += 1
        elif change == "running":
            slot.state = State.READY
        else:
            # A request after a while may try from the beginning, as after a first load that failed.
            self._gone(residence, State.FAILED)

    # --- out ------------------------------------------------------------------------------------------

    async def _unload(self, slot: Slot, because: str) -> None:
        residence = slot.residence
        if residence is None:
            return
        await asyncio.wait([residence.loading])
        engine = residence.engine
        if slot.residence is not residence or engine is None:
            return  # it could not be loaded, or was given up meanwhile
        slot.residence = None
        slot.state, slot.error, slot.unloaded_because = State.UNLOADING, None, because
        await residence.emptied()
        # What hangs will hardly end within any time; what runs ends within that of a batch.
        await self._end(residence, _STOP_S if engine.hung else max(_STOP_S, self._watchdog_s))
        slot.unloads[because] += 1
        logger.info("model %s is unloaded: %s", slot.spec.alias, because)

    async def _end(self, residence: Residence, timeout_s: float) -> None:
        """Stop a model's engine, and give back what its stay took."""
        alias, engine = residence.slot.spec.alias, residence.engine
        if engine is not None:
            try:
                ended = await in_thread(f"stop-{alias}", lambda: engine.stop(timeout_s))
            except Exception:
                logger.exception("model %s was not stopped in good order", alias)
            else:
                if not ended:
                    logger.warning("model %s did not come to an end; it ends with the process", alias)
                    self._on_left_behind(alias, engine)
        self._gone(residence, State.UNLOADED)

    def _gone(self, residence: Residence, state: State) -> None:
        slot = residence.slot
        self._room.residences.discard(residence)
        residence.release()
        slot.residence = None
        slot.state = state
        if state is State.FAILED:
            slot.failed_at = time.monotonic()

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

    def _require_loaded(self, residence: Residence) -> None:
        if residence.loading.cancelled():
            raise self._not_any_more(residence.slot)
        residence.loading.result()

    def _not_any_more(self, slot: Slot) -> ModelNotReadyError:
        what = "The service is shutting down" if self.stopping else f"`{slot.spec.alias}` is served no more"
        return ModelNotReadyError(f"{what}: ask again later.", retry_after_s=_STOPPING_RETRY_AFTER_S)
