"""Tasks that continue when their caller goes away, and that do not delay the shutdown."""

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
    """Tasks of the service. Used on one event loop."""

    def __init__(self, is_shutting_down: Callable[[], bool]) -> None:
        """Create an empty set of tasks.

        Args:
            is_shutting_down: Returns whether the service was asked to stop. Called on any thread.
        """
        self.is_shutting_down = is_shutting_down
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Start a task."""
        task = asyncio.create_task(work)
        # Keep a reference, because the event loop does not, and the task could be garbage-collected.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Retrieve the exception, because it is possible that no caller waits for the task. The model's status shows the failure.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return task

    async def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Start a task and return its result.

        Raises:
            ModelNotReadyError: The service shuts down. The task continues.
            Exception: The task failed.
        """
        task = self.start(work)
        while not task.done():
            self.raise_if_shutting_down()
            await asyncio.wait({task}, timeout=_POLL_S)
        return task.result()

    def raise_if_shutting_down(self) -> None:
        """Stop the caller if the service shuts down. Can be called on any thread.

        Raises:
            ModelNotReadyError: The service shuts down.
        """
        if self.is_shutting_down():
            raise ModelNotReadyError("The service is shutting down. Try again later.", retry_after_s=_RETRY_AFTER_S)
