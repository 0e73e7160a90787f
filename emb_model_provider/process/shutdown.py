"""What tells the process to stop, and its end when it does not come by itself.

A thread of its own does this. A signal's handler runs in the middle of anything, where it may take no lock, and so
cannot log; and the event loop may be busy, or hang.
"""

from __future__ import annotations

import logging
import os
import select
import signal
import socket
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    from emb_model_provider.observability.logs import LineWriter

logger = logging.getLogger(__name__)

_SLACK_S = 30.0
"""What a stop may take beyond the grace period before the process is ended all the same."""
_FLUSH_S = 2.0


class ShutdownSignal:
    """Whether the process is to stop. The first signal asks for it, a second one ends the process at once."""

    def __init__(self, writer: LineWriter, grace_s: float, supervisor: socket.socket | None = None) -> None:
        """Begin to listen for SIGTERM and SIGINT; call it on the main thread.

        `grace_s` is how long accepted requests have, in seconds. `supervisor` is where a supervisor sends the numbers
        of the signals that it got: then a signal to this process itself is another copy of one, and only asks.
        """
        self.reason: str | None = None
        """Who asked; None while nobody has."""
        self._writer = writer
        self._limit_s = grace_s + _SLACK_S
        self._supervisor = supervisor
        self._act: Callable[[], None] | None = None
        self._bell, self._ringer = socket.socketpair()
        self._ringer.setblocking(False)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ring)
        threading.Thread(target=self._watch, name="stop", daemon=True).start()

    def on_shutdown(self, act: Callable[[], None]) -> None:
        """Call `act` when the process is asked to stop, on another thread, or here and now if it has been already."""
        self._act = act
        if self.reason is not None:
            act()

    def _ring(self, number: int, _: FrameType | None) -> None:
        with suppress(BlockingIOError):  # there are enough of them waiting
            self._ringer.send(bytes([number]))

    def _watch(self) -> None:
        ends = [self._bell] if self._supervisor is None else [self._bell, self._supervisor]
        decisive, signals, end_at = ends[-1], 0, None
        while True:
            left_s = None if end_at is None else max(0.0, end_at - time.monotonic())
            ready, _, _ = select.select(ends, [], [], left_s)
            if not ready:
                end_at_once(self._writer, 1, f"not stopped after {self._limit_s:g} s: ending at once")
            for end in ready:
                received = _receive(end)
                if not received:  # only the supervisor's can end
                    ends.remove(end)
                    decisive, signals = self._bell, 1
                    self._ask("the supervisor is gone")
                    continue
                number = received[0]
                signals += end is decisive
                if signals > 1:
                    name = signal.Signals(number).name
                    end_at_once(self._writer, 128 + number, f"{name} once more: ending at once")
                self._ask(signal.Signals(number).name)
            end_at = end_at or time.monotonic() + self._limit_s

    def _ask(self, reason: str) -> None:
        if self.reason is None:
            self.reason = reason
            if self._act is not None:
                self._act()


def _receive(end: socket.socket) -> bytes:
    try:
        return end.recv(1)
    except ConnectionResetError:  # closed with something unread in it
        return b""


def end_at_once(writer: LineWriter, code: int, line: str) -> NoReturn:
    """Log a line and end the process with `code`, whatever else it is doing."""
    logger.error("%s", line)
    flush(writer)
    os._exit(code)


def flush(writer: LineWriter) -> None:
    """Write the log lines that are left, and no more from here on. A terminal that takes none holds up nothing."""
    flushing = threading.Thread(target=writer.stop, daemon=True)
    flushing.start()
    flushing.join(_FLUSH_S)
