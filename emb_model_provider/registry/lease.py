"""A request's use of a model, which stays in memory for as long."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from emb_model_provider.registry.slots import Residence, Slot
    from emb_model_provider.serving.engine import Engine


class Lease:
    """`async with` it once for the model's engine; a model that is not in memory is loaded first."""

    __slots__ = ("_arrive", "_began", "_residence", "_slot")

    def __init__(self, slot: Slot, arrive: Callable[[Slot], Awaitable[Residence]]) -> None:
        """`arrive` returns the stay of a model that is not there yet, the caller counted as its user."""
        self._slot = slot
        self._arrive = arrive

    async def __aenter__(self) -> Engine:
        """Raises: ModelNotReadyError, ModelNotFoundError."""
        residence = self._slot.residence
        if residence is None or residence.engine is None:
            residence = await self._arrive(self._slot)
        else:
            residence.users += 1
        self._residence = residence
        self._began = time.monotonic()
        engine = residence.engine
        if engine is None:
            raise RuntimeError("a model that was loaded has an engine")
        return engine

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._residence.leave()
        self._slot.usage.note(self._began, time.monotonic(), answered=kind is None)
