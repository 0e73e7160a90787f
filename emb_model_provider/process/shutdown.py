"""Tells the process to shut down, and ends it if it does not.

Signals are handled on a thread. A signal handler interrupts the main thread anywhere, so it must not take locks or log,
and the event loop may be busy or hang.
"""

from __future__ import annotations

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

_SLACK_S = 30.0
"""How long a shutdown may take beyond the grace period before the process is ended anyway."""
_FLUSH_S = 2.0

_Source = Literal["process", "supervisor"]
"""Recipient of a signal."""


class ShutdownSignal:
    """Shuts the process down at the first signal, and ends it at once at the second."""

    def __init__(
        self, writer: LineWriter, grace_s: float, supervisor: socket.socket | None = None, *, slack_s: float = _SLACK_S
    ) -> None:
        """Handle SIGTERM and SIGINT from now on. Call it on the main thread.

        Args:
            writer: The log, which is flushed before the process is ended.
            grace_s: How long accepted requests have to finish, in seconds.
            supervisor: Socket on which a supervisor forwards the numbers of its signals. Signals to this process then
                only shut down and never end it at once, because they may be copies of the supervisor's.
            slack_s: How long the shutdown may take beyond `grace_s`, in seconds.
        """
        self.reason: str | None = None
        """Why the process shuts down; None if it does not."""
        self._writer = writer
        self._limit_s = grace_s + slack_s
        self._callback: Callable[[], None] | None = None
        self._counted: _Source = "process" if supervisor is None else "supervisor"
        """The source whose second signal ends the process."""
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
        while (number := _receive(supervisor)) is not None:
            self._signals.put(("supervisor", number))
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


def _receive(connection: socket.socket) -> int | None:
    """Return the next byte, or None at the end of a connection."""
    try:
        received = connection.recv(1)
    except ConnectionResetError:  # the other end was closed before it had read everything
        return None
    return received[0] if received else None
