"""Tells the process to shut down, and ends it if it does not.

Signals are handled on a thread. A signal handler interrupts the main thread anywhere, so it must not take locks or log,
and the event loop may be busy or hang.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import threading
import time
from typing import TYPE_CHECKING, Literal, NoReturn

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from emb_model_provider.observability.logs import LineWriter

logger = logging.getLogger(__name__)

_FLUSH_S = 2.0

_Source = Literal["process", "supervisor"]


class ShutdownSignal:
    """Shuts the process down at the first signal, and ends it at once at the second."""

    def __init__(
        self, writer: LineWriter, grace_s: float, supervisor: socket.socket | None, *, slack_s: float = 30.0
    ) -> None:
        """Handle SIGTERM and SIGINT from now on. Call it on the main thread.

        If a supervisor forwards the numbers of its signals on a socket, signals to this process only shut down and never
        end it at once, because they may be copies of the supervisor's. A shutdown that takes `slack_s` longer than the
        grace period ends the process.
        """
        self.reason: str | None = None
        """Why the process shuts down; None if it does not."""
        self._writer = writer
        self._limit_s = grace_s + slack_s
        self._callback: Callable[[], None] | None = None
        self._counted: _Source = "process" if supervisor is None else "supervisor"
        """The recipient whose second signal ends the process."""
        self._signals: queue.SimpleQueue[tuple[_Source, int | None]] = queue.SimpleQueue()
        """Received signals; the number is None at the end of the supervisor. Its `put` is safe in a signal handler."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: self._signals.put(("process", number)))
        threading.Thread(target=self._watch, name="shutdown", daemon=True).start()
        if supervisor is not None:
            threading.Thread(target=self._listen, args=(supervisor,), name="supervisor", daemon=True).start()

    def on_shutdown(self, callback: Callable[[], None]) -> None:
        """Call a function when the process is to shut down, on another thread, or at once if it already is."""
        self._callback = callback
        if self.reason is not None:
            callback()

    def _listen(self, supervisor: socket.socket) -> None:
        with contextlib.suppress(ConnectionResetError):  # the other end was closed before it had read everything
            while received := supervisor.recv(1):
                self._signals.put(("supervisor", received[0]))
        self._signals.put(("supervisor", None))

    def _watch(self) -> None:
        signals, end_at = 0, None
        while True:
            timeout_s = None if end_at is None else max(0.0, end_at - time.monotonic())
            try:
                source, number = self._signals.get(timeout=timeout_s)
            except queue.Empty:
                end_at_once(self._writer, 1, f"shutdown did not finish within {self._limit_s:g} s, exiting immediately")
            if number is None:
                # From now on only signals to this process are left.
                self._counted, signals = "process", 1
                self._request("the supervisor is gone")
            else:
                name = signal.Signals(number).name
                signals += source == self._counted
                if signals > 1:
                    end_at_once(self._writer, 128 + number, f"second signal ({name}), exiting immediately")
                self._request(name)
            end_at = end_at or time.monotonic() + self._limit_s

    def _request(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason
            if self._callback is not None:
                self._callback()


def end_at_once(writer: LineWriter, code: int, line: str) -> NoReturn:
    """Log an error and end the process, whatever its other threads are doing."""
    logger.error("%s", line)
    flush(writer)
    os._exit(code)


def flush(writer: LineWriter) -> None:
    """Write the remaining log lines. Waits only briefly, because a terminal or a disk may block."""
    thread = threading.Thread(target=writer.stop, daemon=True)
    thread.start()
    thread.join(_FLUSH_S)
