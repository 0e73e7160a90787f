"""Threads for blocking work, and a lock with a bound on waiting."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from emb_model_provider.errors import ThreadLimitError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_RETRY_AFTER_S = 30.0


def start_thread(thread: threading.Thread) -> None:
    """Start a thread.

    Raises:
        ThreadLimitError: The operating system refuses to. The message says what to do.
    """
    try:
        thread.start()
    except RuntimeError as error:
        raise ThreadLimitError(
            f"The system refuses to start another thread ({error}). Raise its limit of processes and threads (ulimit -u; "
            "for a container --pids-limit), or the memory, and try again.",
            retry_after_s=_RETRY_AFTER_S,
        ) from error


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
    start_thread(threading.Thread(target=run, name=name, daemon=True))
    return await asyncio.wrap_future(done)
