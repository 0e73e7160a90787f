"""Checks the models periodically: reports those that hang, and unloads those that are idle."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from emb_model_provider.registry.model_entry import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from emb_model_provider.registry.model_entry import ModelEntry
    from emb_model_provider.serving.engine import Engine

logger = logging.getLogger(__name__)

IDLE = "idle"
_CHECK_EVERY_S = 1.0


class Watchdog:
    """Watches the models of a registry. Used on one event loop."""

    def __init__(
        self,
        entries: Callable[[], Iterable[ModelEntry]],
        *,
        watchdog_s: float,
        idle_unload_s: float | None,
        unload: Callable[[ModelEntry, str], object],
    ) -> None:
        """Create a watchdog.

        Args:
            entries: Returns the models of the registry.
            watchdog_s: For how long a model must hang before `on_hung` of `run` is called, in seconds.
            idle_unload_s: After how many seconds without a request a model is unloaded; None: never.
            unload: Starts to unload a model, for a reason.
        """
        self._entries = entries
        self._watchdog_s = watchdog_s
        self._idle_unload_s = idle_unload_s
        self._unload = unload
        self._hung_since: dict[Engine, float] = {}
        self._abandoned: dict[Engine, str] = {}
        """Engines that hang and are no longer in the registry, with their aliases."""

    def track(self, alias: str, engine: Engine) -> None:
        """Continue to watch an engine that could not be stopped."""
        self._abandoned[engine] = alias

    async def run(self, on_hung: Callable[[str], None] | None) -> None:
        """Watch the models until cancelled.

        Args:
            on_hung: Called with the reason when a model has hung for `watchdog_s` seconds.
        """
        pause_s = min(_CHECK_EVERY_S, self._watchdog_s / 2, (self._idle_unload_s or _CHECK_EVERY_S) / 2)
        while True:
            await asyncio.sleep(pause_s)
            engines = {entry.engine: entry.spec.alias for entry in self._entries() if entry.engine is not None}
            self._abandoned = {engine: alias for engine, alias in self._abandoned.items() if engine.hang_report}
            engines |= self._abandoned
            self._hung_since = {engine: since for engine, since in self._hung_since.items() if engine in engines}
            for engine, alias in engines.items():
                self._check_for_hang(engine, alias, on_hung)
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
        for entry in list(self._entries()):
            loaded_model = entry.loaded_model
            if entry.state is not State.READY or loaded_model is None or loaded_model.ref_count:
                continue
            if now - loaded_model.last_used_at >= idle_s:
                self._unload(entry, IDLE)
