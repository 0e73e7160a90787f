"""Keeps the loaded models within the memory budget, by evicting models to make room for others."""

from __future__ import annotations

import asyncio
import contextlib
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


class MemoryBudget:
    """Keeps the loaded models within MAX_LOADED_MODELS and MODEL_MEMORY_LIMIT. Used on one event loop."""

    def __init__(
        self,
        limits: MemorySettings,
        begin_unloading: Callable[[ModelEntry, str], asyncio.Task[None]],
        default_bytes: int | None = None,
    ) -> None:
        """Create an empty budget.

        `begin_unloading` starts to unload a model, for a reason. Without limits, models are evicted above `default_bytes`.
        """
        self.loaded: set[LoadedModel] = set()
        """Models that take memory: those that are loading, loaded or unloading."""
        self._max_models = limits.max_loaded_models
        self._max_bytes = limits.model_memory_limit
        is_limited = limits.model_memory_limit is not None or limits.max_loaded_models is not None
        self._evicts_above = limits.model_memory_limit if is_limited else default_bytes
        self._begin_unloading = begin_unloading
        self._turn = asyncio.Lock()
        """Held while evicting, because two loads at once would both count on the memory of one evicted model."""
        self._awaited: set[ModelEntry] = set()
        """Models that are unloaded for the holder of the turn. If one is still loading, its load must not wait for the turn."""

    @property
    def is_exceeded(self) -> bool:
        total = sum(loaded_model.memory_bytes for loaded_model in self.loaded)
        return self._evicts_above is not None and total > self._evicts_above

    def check_fits(self, needed_bytes: int) -> None:
        """Raise LoadError if a model needs more memory than the limit for all models."""
        if self._max_bytes is not None and needed_bytes > self._max_bytes:
            raise LoadError(
                f"it needs {format_size(needed_bytes)} of memory, and all models together are limited to "
                f"{format_size(self._max_bytes)}. Increase EMB_PROVIDER_MODEL_MEMORY_LIMIT, or choose a lower "
                "precision (`--precision int8`, or EMB_PROVIDER_MODEL_PRECISION=int8)."
            )

    async def reserve(self, model: LoadedModel, minimum_bytes: int, expected_bytes: int) -> None:
        """Wait until a model may be loaded, evicting others after their requests are answered.

        Raises LoadError if `minimum_bytes` exceeds the limit for all models. If only `expected_bytes` does, the model is
        loaded nevertheless, and checked afterwards.
        """
        self.check_fits(minimum_bytes)
        model.expected_bytes = expected_bytes if self._max_bytes is None else min(expected_bytes, self._max_bytes)
        model.step_started_at, model.waiting_for = time.monotonic(), "other models are loaded first"
        # A model that is evicted while torch loads it can need memory again, for its compiled form.
        async with contextlib.nullcontext() if model.entry in self._awaited else self._turn:
            await self._evict_until_fits(model)
            self.loaded.add(model)
        model.step_started_at = time.monotonic()

    def reserve_free(self, model: LoadedModel, expected_bytes: int) -> None:
        """Reserve memory for a model without evicting others; LoadError if there is not enough."""
        model.expected_bytes = expected_bytes
        if self._next_eviction(model) is not None or not self.fits_beside(None, expected_bytes):
            raise LoadError(
                f"it would need {format_size(expected_bytes)} until it is compiled, which is more than is free"
            )
        self.loaded.add(model)

    def fits_beside(self, model: LoadedModel | None, expected_bytes: int) -> bool:
        """Return whether a model with this memory can be in memory together with another one, and with no others."""
        present = model.memory_bytes if model is not None else 0
        return self._evicts_above is None or present + expected_bytes <= self._evicts_above

    async def rebalance(self, model: LoadedModel) -> None:
        """Evict other models if a model takes more memory than expected."""
        async with self._turn:
            if model in self.loaded:
                await self._evict_until_fits(model)

    async def _evict_until_fits(self, model: LoadedModel) -> None:
        while (evicted := self._next_eviction(model)) is not None:
            logger.info(
                "evicting model %s to make room for %s%s",
                evicted.entry.spec.alias,
                model.entry.spec.alias,
                ", after its requests are answered" if evicted.ref_count else "",
            )
            when = "after its requests are answered" if evicted.engine is not None else "after it is loaded"
            model.waiting_for = f"`{evicted.entry.spec.alias}` is unloaded first, {when}"
            self._awaited.add(evicted.entry)
            try:
                # asyncio.wait, because an error or a cancellation of the unload task does not concern this load.
                await asyncio.wait([self._begin_unloading(evicted.entry, "room for another model")])
            finally:
                self._awaited.discard(evicted.entry)
            self.loaded.discard(evicted)
        model.waiting_for = ""

    def _next_eviction(self, model: LoadedModel) -> LoadedModel | None:
        total_bytes = sum(loaded_model.memory_bytes for loaded_model in {*self.loaded, model})
        # A model that is replaced by its compiled form is no other one.
        others = [loaded_model for loaded_model in self.loaded if loaded_model.entry is not model.entry]
        too_many = self._max_models is not None and len({each.entry for each in others}) >= self._max_models
        too_large = self._evicts_above is not None and total_bytes > self._evicts_above
        if not others or not (too_many or too_large):
            return None
        return min(others, key=_eviction_key)


def _eviction_key(loaded_model: LoadedModel) -> tuple[bool, bool, bool, float]:
    """Order of eviction: models already being unloaded, then idle models, least recently used first."""
    is_current = loaded_model.entry.loaded_model is loaded_model
    return is_current, loaded_model.engine is None, loaded_model.ref_count > 0, loaded_model.last_used_at
