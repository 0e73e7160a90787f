"""Threads for blocking work, and a lock with a bound on waiting."""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import time
from concurrent.futures import Future
from typing import TYPE_CHECKING, TypeVar

from emb_model_provider.errors import ForkedProcessError, ThreadLimitError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

_RETRY_AFTER_S = 30.0
_TURN_S = 0.0005


class ForkGuard:
    """Finds that this process was forked after an object had started its threads, which do not exist here.

    Without it, a call would wait for ever for these threads, or for locks that they held.
    """

    def __init__(self, subject: str) -> None:
        """Guard what `subject` names, as the beginning of a message, from now on."""
        self._subject = subject
        self._pid = os.getpid()

    @property
    def is_other_process(self) -> bool:
        return os.getpid() != self._pid

    def check(self) -> None:
        """Raise ForkedProcessError if this is another process."""
        if self.is_other_process:
            raise ForkedProcessError(
                f"{self._subject} in process {self._pid}, from which this process {os.getpid()} was forked: its threads do not "
                "exist here. Load the model in each process after the fork: with gunicorn without --preload or in the hook "
                "post_fork, with Celery at the signal worker_process_init, with multiprocessing by the start method spawn."
            )


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


class Turns:
    """Lets other threads take the interpreter lock during long work, sooner than after the switch interval of 5 ms.

    The event loop would wait that long for each of its steps. More often than every half millisecond is not worth it, because
    the system may run another thread first on a busy processor.
    """

    def __init__(self) -> None:
        self._due = time.monotonic() + _TURN_S

    def give(self) -> None:
        """Give up the lock for a moment if the last time is a while ago."""
        if (now := time.monotonic()) >= self._due:
            time.sleep(0)
            self._due = now + _TURN_S


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
