"""Looking at the models again and again: which hang, and which nobody asks for any more."""

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
_EVERY_S = 1.0


class Watchdog:
    """What is seen of the models of a registry, over time."""

    def __init__(
        self,
        entries: Callable[[], Iterable[ModelEntry]],
        *,
        watchdog_s: float,
        idle_unload_s: float | None,
        unload: Callable[[ModelEntry, str], object],
    ) -> None:
        """`unload` begins to unload a model, for the reason that it is given."""
        self._entries = entries
        self._watchdog_s = watchdog_s
        self._idle_unload_s = idle_unload_s
        self._unload = unload
        self._hung_since: dict[Engine, float] = {}
        self._abandoned: dict[Engine, str] = {}

    def track(self, alias: str, engine: Engine) -> None:
        """Go on looking at a model that was to end and hangs."""
        self._abandoned[engine] = alias

    async def run(self, on_hung: Callable[[str], None] | None) -> None:
        """Look until cancelled; `on_hung` is called with what to say where a model has hung for long."""
        pause_s = min(_EVERY_S, self._watchdog_s / 2, (self._idle_unload_s or _EVERY_S) / 2)
        while True:
            await asyncio.sleep(pause_s)
            present = {
                entry.engine: entry.spec.alias for entry in self._entries() if entry.engine is not None
            }
            self._abandoned = {
                engine: alias for engine, alias in self._abandoned.items() if engine.hang_report
            }
            seen = present | self._abandoned
            self._hung_since = {engine: since for engine, since in self._hung_since.items() if engine in seen}
            for engine, alias in seen.items():
                self._check_for_hang(engine, alias, on_hung)
            if self._idle_unload_s is not None:
                self._unload_idle(self._idle_unload_s)

    def _check_for_hang(self, engine: Engine, alias: str, on_hung: Callable[[str], None] | None) -> None:
        hang_report = engine.hang_report
        now = time.monotonic()
        if not hang_report:
            if self._hung_since.pop(engine, None) is not None:
                logger.warning("model %s hangs no more", alias)
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
