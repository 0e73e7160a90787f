"""Handles Ctrl-C in commands whose threads or child processes do not end by themselves."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, TypeVar

from emb_model_provider.cli.output import say
from emb_model_provider.error_table import INTERRUPTED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

RESUME_HINT = "what was downloaded so far is kept. To continue, run the same command again."
_POLL_S = 0.2


def run_until_interrupted(work: Callable[[], T], message: str, *, stop: Callable[[], float] = lambda: 0.0) -> T:
    """Return the result of `work`, which runs on a thread; on Ctrl-C call `stop`, print a message and end this process.

    `stop` tells the work to stop, and returns how many seconds to wait for that; a second Ctrl-C ends the wait. By
    default the process does not wait, because nothing can interrupt a transfer of a hub client, which could take
    minutes. Its locks end with it, and what was downloaded is kept.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - raised in the main thread
            done.set_exception(error)

    try:
        threading.Thread(target=run, name="command", daemon=True).start()
        # Not join(), because an interrupted join() of Python 3.11 marks the thread as ended.
        while not wait([done], _POLL_S).done:
            pass
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):
            wait([done], stop())
        say(f"\ninterrupted: {message}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(INTERRUPTED)
    return done.result()


@contextlib.contextmanager
def delayed_interrupts() -> Iterator[None]:
    """Raise a KeyboardInterrupt only at the end of the context, in which a child process is started and registered.

    The child inherits the blocked signal. So only this process ends it, and it prints no traceback.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    received: list[int] = []
    # Blocking is for the child. In this process another thread, such as one of numpy, can still receive the signal,
    # and then the handler runs on the main thread.
    handler = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if received:
        raise KeyboardInterrupt
