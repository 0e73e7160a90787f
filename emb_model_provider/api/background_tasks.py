"""Work that goes on when its caller goes away, and that the end of the service does not wait for."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from emb_model_provider.errors import ModelNotReadyError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")

_LOOK_EVERY_S = 0.25
_STOPPING_RETRY_AFTER_S = 5.0


class GoingOn:
    """What was begun for callers, who may wait for it. Used on one event loop."""

    def __init__(self, is_stopping: Callable[[], bool]) -> None:
        """`is_stopping` says whether the service was asked to end; it is asked on any thread."""
        self._is_stopping = is_stopping
        self._tasks: set[asyncio.Task[Any]] = set()

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop alone would let it be collected
        task.add_done_callback(self._tasks.discard)
        # Fetched here, so that a failure nobody waits for does not end as "never retrieved": the status tells it.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return task

    async def finished(self, work: Coroutine[Any, Any, T]) -> T:
        """Return what `work` returns.

        Raises: what `work` raises; ModelNotReadyError once the service is to end, which leaves the work to itself.
        """
        task = self.begin(work)
        while not task.done():
            self.require_time()
            await asyncio.wait({task}, timeout=_LOOK_EVERY_S)
        return task.result()

    def require_time(self) -> None:
        """Raises: ModelNotReadyError once the service was asked to end. May be called on any thread."""
        if self._is_stopping():
            raise ModelNotReadyError(
                "The service is shutting down: ask again later.", retry_after_s=_STOPPING_RETRY_AFTER_S
            )
