"""Work that continues when its caller goes away, and that does not delay the shutdown."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar

from emb_model_provider.errors import ModelNotReadyError

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

T = TypeVar("T")

_POLL_S = 0.25
_RETRY_AFTER_S = 5.0


class BackgroundTasks:
    """Tasks of the service, whose callers may wait for them. Used on one event loop."""

    def __init__(self, is_shutting_down: Callable[[], bool]) -> None:
        """Create an empty set of tasks.

        Args:
            is_shutting_down: Whether the service was asked to stop. Called on any thread.
        """
        self.is_shutting_down = is_shutting_down
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task."""
        task = asyncio.create_task(work)
        self._tasks.add(task)  # else it could be garbage-collected
        task.add_done_callback(self._tasks.discard)
        # Retrieve the exception, because a failure that nobody waits for is reported by the model's status.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return task

    async def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Start a task and return its result.

        Raises:
            ModelNotReadyError: The service shuts down. The task continues.
            Exception: Whatever the task raises.
        """
        task = self.start(work)
        while not task.done():
            self.raise_if_shutting_down()
            await asyncio.wait({task}, timeout=_POLL_S)
        return task.result()

    def raise_if_shutting_down(self) -> None:
        """End the work of the caller if the service shuts down. Can be called on any thread.

        Raises:
            ModelNotReadyError: The service shuts down.
        """
        if self.is_shutting_down():
            raise ModelNotReadyError(
                "The service is shutting down: try again later.", retry_after_s=_RETRY_AFTER_S
            )
