"""Looking at the models again and again: which hang, and which nobody asks for any more."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from emb_model_provider.registry.model_entry import State

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from emb_model_provider.registry.model_entry import Slot
    from emb_model_provider.serving.engine import Engine

logger = logging.getLogger(__name__)

IDLE = "idle"
_EVERY_S = 1.0


class Watch:
    """What is seen of the models of a registry, over time."""

    def __init__(
        self,
        slots: Callable[[], Iterable[Slot]],
        *,
        watchdog_s: float,
        idle_unload_s: float | None,
        unload: Callable[[Slot, str], object],
    ) -> None:
        """`unload` begins to unload a model, for the reason that it is given."""
        self._slots = slots
        self._watchdog_s = watchdog_s
        self._idle_unload_s = idle_unload_s
        self._unload = unload
        self._hung_since: dict[Engine, float] = {}
        self._left_behind: dict[Engine, str] = {}

    def keep_an_eye_on(self, alias: str, engine: Engine) -> None:
        """Go on looking at a model that was to end and hangs."""
        self._left_behind[engine] = alias

    async def run(self, on_hung: Callable[[str], None] | None) -> None:
        """Look until cancelled; `on_hung` is called with what to say where a model has hung for long."""
        pause_s = min(_EVERY_S, self._watchdog_s / 2, (self._idle_unload_s or _EVERY_S) / 2)
        while True:
            await asyncio.sleep(pause_s)
            present = {slot.engine: slot.spec.alias for slot in self._slots() if slot.engine is not None}
            self._left_behind = {engine: alias for engine, alias in self._left_behind.items() if engine.hung}
            seen = present | self._left_behind
            self._hung_since = {engine: since for engine, since in self._hung_since.items() if engine in seen}
            for engine, alias in seen.items():
                self._look_for_hangs(engine, alias, on_hung)
            if self._idle_unload_s is not None:
                self._unload_idle(self._idle_unload_s)

    def _look_for_hangs(self, engine: Engine, alias: str, on_hung: Callable[[str], None] | None) -> None:
        hung = engine.hung
        now = time.monotonic()
        if not hung:
            if self._hung_since.pop(engine, None) is not None:
                logger.warning("model %s hangs no more", alias)
            return
        if engine not in self._hung_since:
            self._hung_since[engine] = now
            logger.error("model %s hangs: %s", alias, hung)
        if on_hung is not None and now - self._hung_since[engine] >= self._watchdog_s:
            on_hung(f"model {alias} hangs: {hung}")

    def _unload_idle(self, idle_s: float) -> None:
        now = time.monotonic()
        for slot in list(self._slots()):
            residence = slot.residence
            if slot.state is not State.READY or residence is None or residence.users:
                continue
            if now - residence.last_needed >= idle_s:
                self._unload(slot, IDLE)
