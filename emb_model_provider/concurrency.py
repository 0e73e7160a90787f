"""Blocking work on dedicated threads, and a lock with a bound on waiting."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class BoundedLock:
    """A lock that raises TimeoutError if another thread holds it for too long, so that no thread waits forever."""

    def __init__(self, timeout_s: float, holder: str) -> None:
        """Create a lock; `holder` says in messages what holds it."""
        self._lock = threading.Lock()
        self._timeout_s = timeout_s
        self._holder = holder

    def __enter__(self) -> None:
        if not self._lock.acquire(timeout=self._timeout_s):
            raise TimeoutError(f"{self._holder} for more than {self._timeout_s:g} s. Restart the service")

    def __exit__(self, *_: object) -> None:
        self._lock.release()


async def run_in_daemon_thread(name: str, work: Callable[[], T]) -> T:
    """Call `work` on a daemon thread, and return its result. Cancelling the call does not stop the thread.

    Unlike `asyncio.to_thread`, it needs no thread of the loop's pool, where downloads that hang would block requests,
    and neither the end of the loop nor that of the process waits for the thread.
    """
    done: Future[T] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            result = context.run(work)
        except BaseException as error:  # noqa: BLE001 - it is passed to the caller
            done.set_exception(error)
        else:
            done.set_result(result)

    done.set_running_or_notify_cancel()
    threading.Thread(target=run, name=name, daemon=True).start()
    return await asyncio.wrap_future(done)
