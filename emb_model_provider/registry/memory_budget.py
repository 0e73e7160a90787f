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

    from emb_model_provider.registry.model_entry import LoadedModel, ModelEntry
    from emb_model_provider.settings import MemorySettings

logger = logging.getLogger(__name__)

EVICTED = "room for another model"


class MemoryBudget:
    """Keeps the loaded models within MAX_LOADED_MODELS and MODEL_MEMORY_LIMIT. Used on one event loop."""

    def __init__(
        self, limits: MemorySettings, begin_unloading: Callable[[ModelEntry, str], asyncio.Task[None]]
    ) -> None:
        self.loaded: set[LoadedModel] = set()
        """Those that take memory: loading, loaded, and not quite gone."""
        self._most = limits.max_loaded_models
        self._limit = limits.model_memory_limit
        self._begin_unloading = begin_unloading
        # Two that made room side by side would each count on the room that the other made.
        self._turn = asyncio.Lock()

    async def reserve(self, coming: LoadedModel, minimum_bytes: int, likely_bytes: int) -> None:
        """Let a model into memory, once there is room for it: others leave, their requests answered first.

        Raises: LoadError where not even `minimum_bytes` fit; that `likely_bytes` do not fit is seen when it is loaded.
        """
        self.check_fits(minimum_bytes)
        coming.expected_bytes = likely_bytes if self._limit is None else min(likely_bytes, self._limit)
        coming.step_started_at, coming.waiting_for = time.monotonic(), "others that wait for it come first"
        async with self._turn:
            await self._evict_until_fits(coming)
            self.loaded.add(coming)
        coming.step_started_at = time.monotonic()

    async def rebalance(self, loaded_model: LoadedModel) -> None:
        """Make room once more for a model that takes more memory than was expected of it."""
        async with self._turn:
            if loaded_model in self.loaded:
                await self._evict_until_fits(loaded_model)

    def check_fits(self, needed_bytes: int) -> None:
        """Raises: LoadError where a model needs more memory than all models together may take."""
        if self._limit is not None and needed_bytes > self._limit:
            raise LoadError(
                f"it needs {format_size(needed_bytes)} of memory, and all models together may have "
                f"{format_size(self._limit)}. Set EMB_PROVIDER_MODEL_MEMORY_LIMIT higher, or serve it at a lower precision "
                "(EMB_PROVIDER_MODEL_PRECISION=int8)."
            )

    @property
    def is_exceeded(self) -> bool:
        """Whether the models in memory take more than they may."""
        total = sum(loaded_model.memory_bytes for loaded_model in self.loaded)
        return self._limit is not None and total > self._limit

    async def _evict_until_fits(self, coming: LoadedModel) -> None:
        while (leaving := self._next_eviction(coming)) is not None:
            logger.info(
                "model %s makes room for %s%s",
                leaving.entry.spec.alias,
                coming.entry.spec.alias,
                ", once its requests are answered" if leaving.ref_count else "",
            )
            coming.waiting_for = f"`{leaving.entry.spec.alias}` is to be unloaded first, {_when(leaving)}"
            # Neither raised nor cancelled with this wait: it is the unloading's own.
            await asyncio.wait([self._begin_unloading(leaving.entry, EVICTED)])
            self.loaded.discard(leaving)
        coming.waiting_for = ""

    def _next_eviction(self, coming: LoadedModel) -> LoadedModel | None:
        others = [loaded_model for loaded_model in self.loaded if loaded_model is not coming]
        taken = coming.memory_bytes + sum(loaded_model.memory_bytes for loaded_model in others)
        too_many = self._most is not None and len(others) >= self._most
        if not others or not (too_many or (self._limit is not None and taken > self._limit)):
            return None
        return min(others, key=_eviction_key)


def _when(leaving: LoadedModel) -> str:
    return "once its requests are answered" if leaving.engine is not None else "once it is loaded"


def _eviction_key(loaded_model: LoadedModel) -> tuple[bool, bool, bool, float]:
    """Order models by how little they are missed: those that leave anyway, then idle ones, the longest first."""
    stays = loaded_model.entry.loaded_model is loaded_model
    return stays, loaded_model.engine is None, loaded_model.ref_count > 0, loaded_model.last_used_at
