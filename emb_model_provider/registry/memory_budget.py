"""Room in memory: which models are there, and which leave so that another can come."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from emb_model_provider.errors import LoadError
from emb_model_provider.formatting import format_size

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.registry.model_entry import Residence, Slot
    from emb_model_provider.settings import ResidencySettings

logger = logging.getLogger(__name__)

MAKES_ROOM = "room for another model"


class Room:
    """Keeps the loaded models within MAX_LOADED_MODELS and MODEL_MEMORY_LIMIT. Used on one event loop."""

    def __init__(
        self, limits: ResidencySettings, begin_unloading: Callable[[Slot, str], asyncio.Task[None]]
    ) -> None:
        self.residences: set[Residence] = set()
        """Those that take memory: loading, loaded, and not quite gone."""
        self._most = limits.max_loaded_models
        self._limit = limits.memory_limit_bytes
        self._begin_unloading = begin_unloading
        # Two that made room side by side would each count on the room that the other made.
        self._turn = asyncio.Lock()

    async def admit(self, coming: Residence, least_bytes: int, likely_bytes: int) -> None:
        """Let a model into memory, once there is room for it: others leave, their requests answered first.

        Raises: LoadError where not even `least_bytes` fit; that `likely_bytes` do not fit is seen when it is loaded.
        """
        self.require_fits(least_bytes)
        coming.expected_bytes = likely_bytes if self._limit is None else min(likely_bytes, self._limit)
        coming.step_began, coming.waits_for = time.monotonic(), "others that wait for it come first"
        async with self._turn:
            await self._make_room(coming)
            self.residences.add(coming)
        coming.step_began = time.monotonic()

    async def correct(self, residence: Residence) -> None:
        """Make room once more for a model that takes more memory than was expected of it."""
        async with self._turn:
            if residence in self.residences:
                await self._make_room(residence)

    def require_fits(self, needed_bytes: int) -> None:
        """Raises: LoadError where a model needs more memory than all models together may take."""
        if self._limit is not None and needed_bytes > self._limit:
            raise LoadError(
                f"it needs {format_size(needed_bytes)} of memory, and all models together may have "
                f"{format_size(self._limit)}. Set EMB_PROVIDER_MODEL_MEMORY_LIMIT higher, or serve it at a lower precision "
                "(EMB_PROVIDER_MODEL_PRECISION=int8)."
            )

    @property
    def is_over(self) -> bool:
        """Whether the models in memory take more than they may."""
        total = sum(residence.memory_bytes for residence in self.residences)
        return self._limit is not None and total > self._limit

    async def _make_room(self, coming: Residence) -> None:
        while (leaving := self._next_to_leave(coming)) is not None:
            logger.info(
                "model %s makes room for %s%s",
                leaving.slot.spec.alias,
                coming.slot.spec.alias,
                ", once its requests are answered" if leaving.users else "",
            )
            coming.waits_for = f"`{leaving.slot.spec.alias}` is to be unloaded first, {_when(leaving)}"
            # Neither raised nor cancelled with this wait: it is the unloading's own.
            await asyncio.wait([self._begin_unloading(leaving.slot, MAKES_ROOM)])
            self.residences.discard(leaving)
        coming.waits_for = ""

    def _next_to_leave(self, coming: Residence) -> Residence | None:
        others = [residence for residence in self.residences if residence is not coming]
        taken = coming.memory_bytes + sum(residence.memory_bytes for residence in others)
        too_many = self._most is not None and len(others) >= self._most
        if not others or not (too_many or (self._limit is not None and taken > self._limit)):
            return None
        return min(others, key=_reluctance)


def _when(leaving: Residence) -> str:
    return "once its requests are answered" if leaving.engine is not None else "once it is loaded"


def _reluctance(residence: Residence) -> tuple[bool, bool, bool, float]:
    """Order models by how little they are missed: those that leave anyway, then idle ones, the longest first."""
    stays = residence.slot.residence is residence
    return stays, residence.engine is None, residence.users > 0, residence.last_needed
