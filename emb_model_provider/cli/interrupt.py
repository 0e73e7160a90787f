"""Ctrl-C, while threads of the hubs' clients transfer files, which nothing can interrupt."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, NoReturn, TypeVar

from emb_model_provider.cli.output import say
from emb_model_provider.error_table import INTERRUPTED

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")
GO_ON = "what was fetched so far is kept. The same command goes on with it."
_LOOK_S = 0.2


def run_until_interrupted(
    work: Callable[[], T], last_words: str, *, stop: Callable[[], float] = lambda: 0.0
) -> T:
    """Return what `work` returns, or raise what it raises; on Ctrl-C say `last_words` and end this process.

    `work` runs on a thread of its own. `stop` asks it to clear up and end, and returns for how many seconds it may; a
    second Ctrl-C does not wait. Then the process ends, whatever its threads do: waiting for a transfer could take as
    long as the transfer. What was fetched stays, and locks end with the process.
    """
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:  # noqa: BLE001 - handed over to whoever waits
            done.set_exception(error)

    try:
        threading.Thread(target=run, name="command", daemon=True).start()
        # Not join(): interrupted, Python 3.11's takes the thread for ended.
        while not wait([done], _LOOK_S).done:
            pass
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):
            wait([done], stop())
        _end(last_words)
    return done.result()


def _end(last_words: str) -> NoReturn:
    say(f"\ninterrupted: {last_words}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(INTERRUPTED)
