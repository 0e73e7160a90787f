"""A small process that keeps the port open and restarts the service (`EMB_PROVIDER_SUPERVISE=true`).

The service runs as a child process that inherits the listening sockets. It is restarted if it crashes, or exits with
`HUNG_EXIT` because a model hangs. Meanwhile new connections wait in the backlog of the sockets, so none is refused. If
the child ends in any other way, the supervisor exits with its exit code.

The event loop of the child sends a heartbeat: one byte per second. If it stops, because the loop is blocked or native
code holds the GIL, the child is aborted, which prints the stacks of its threads to stderr, and restarted.

Signals are forwarded as bytes over a pair of connected sockets, the parent pipe, because a terminal and systemd send
signals to the whole process group, and a second one would end the child at once. If the supervisor ends, however it
does, the pipe is closed and the child shuts down.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

logger = logging.getLogger(__name__)

HUNG_EXIT = 70
"""Exit code (EX_SOFTWARE) with which the service asks for a restart."""
HEARTBEAT_EVERY_S = 1.0
_VARIABLE = "_EMB_PROVIDER_SUPERVISED"
"""Environment variable of the child that describes the inherited state. Its name shows that it is not a setting."""
_FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorTimings:
    """How long a supervisor waits, in seconds."""

    heartbeat_timeout_s: float = 20.0
    """A busy machine or the import of a large library can delay a heartbeat by seconds."""
    restart_pauses_s: tuple[float, ...] = (0, 1, 2, 4, 8, 16, 30)
    """Pauses before restarts, by the number of consecutive children that ended early."""
    stable_after_s: float = 60.0
    """A child that ran for this long did not end early."""
    kill_after_s: float = 5.0
    """How long a child may take to end at once before it is killed."""


@dataclass(frozen=True, slots=True)
class InheritedState:
    """What the service inherits from its supervisor."""

    parent_pipe: socket.socket
    """Transfers the numbers of signals to the child and heartbeats to the supervisor, one byte each."""
    sockets: list[socket.socket]
    previous_end: str
    """How the previous child ended; empty for the first child."""

    def beat(self) -> None:
        """Send a heartbeat to the supervisor. Call it every `HEARTBEAT_EVERY_S` seconds on the event loop."""
        # The buffer can be full, and the supervisor gone, which `ShutdownSignal` notices.
        with suppress(OSError):
            self.parent_pipe.send(b"\0", socket.MSG_DONTWAIT)


def take_inherited_state() -> InheritedState | None:
    """Return what this process inherits from a supervisor, or None without one. Its own children do not inherit it."""
    text = os.environ.pop(_VARIABLE, None)
    if text is None:
        return None
    state = json.loads(text)
    parent_pipe, *sockets = (socket.socket(fileno=number) for number in (state["parent_pipe"], *state["sockets"]))
    for inherited in (parent_pipe, *sockets):
        inherited.set_inheritable(False)
    return InheritedState(parent_pipe, sockets, state["previous_end"])


class Supervisor:
    """Runs the command line of this process as a child process. Used once, on the main thread."""

    def __init__(self, sockets: Sequence[socket.socket], timings: SupervisorTimings) -> None:
        """Handle signals from now on. The sockets are closed as soon as the service is to shut down."""
        self._sockets = sockets
        self._timings = timings
        self._received: list[int] = []
        """The received shutdown signals, in order."""
        # Signals only write to a socket, so that they are handled between two steps and never within one.
        self._wakeup, self._wakeup_writer = socket.socketpair()
        self._wakeup.setblocking(False)
        self._wakeup_writer.setblocking(False)
        signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)
        for number in (*_FORWARDED_SIGNALS, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)  # because signals without a handler are not written to the socket

    def run(self) -> int:
        """Keep the service running until it exits by itself or is shut down; return the exit code."""
        early_ends, previous_end = 0, ""
        while True:
            started = time.monotonic()
            try:
                code = self._run_child(previous_end)
                end = _describe_exit(code)
            except OSError as error:
                code, end = HUNG_EXIT, f"could not be started ({error})"
            ran_s = time.monotonic() - started
            if self._received:
                return self._shutdown_exit_code(code)
            if code >= 0 and code != HUNG_EXIT:
                logger.log(logging.ERROR if code else logging.INFO, "the service %s, exiting", end)
                return code
            early_ends = early_ends + 1 if ran_s < self._timings.stable_after_s else 1
            pauses_s = self._timings.restart_pauses_s
            pause_s = pauses_s[min(early_ends, len(pauses_s)) - 1]
            previous_end = f"{end} after {ran_s:.1f} s"
            when = f"in {pause_s:g} s" if pause_s else "at once"
            logger.error("the service %s, restarting it %s", previous_end, when)
            self._pause(pause_s)
            if self._received:
                return 0

    def _run_child(self, previous_end: str) -> int:
        """Start the service and wait for its end; return its exit code, negative for a signal."""
        parent_pipe, child_end = socket.socketpair()
        with parent_pipe:
            with child_end:
                child = self._start_child(child_end, previous_end)
            logger.info("the service is process %d", child.pid)
            heartbeat = _Heartbeat(parent_pipe, self._timings.heartbeat_timeout_s)
            kill_after_s = self._timings.kill_after_s
            kill_at: float | None = None
            while (code := child.poll()) is None:
                wait_s = heartbeat.next_check_s if kill_at is None else max(0.0, kill_at - time.monotonic())
                for number in self._wait(wait_s, heartbeat):
                    with suppress(OSError):  # the child has just ended
                        parent_pipe.send(bytes([number]))
                if kill_at is not None and time.monotonic() >= kill_at:
                    logger.error("the service did not end within %.0f s, killing it", kill_after_s)
                    child.kill()
                    child.wait()
                elif kill_at is None and len(self._received) > 1:
                    kill_at = time.monotonic() + kill_after_s
                elif kill_at is None and not self._received and heartbeat.is_lost:
                    logger.error(
                        "the service sent no heartbeat for %.0f s, aborting it", self._timings.heartbeat_timeout_s
                    )
                    child.send_signal(signal.SIGABRT)  # faulthandler prints the stacks of all threads
                    kill_at = time.monotonic() + kill_after_s
            return code

    def _start_child(self, parent_pipe: socket.socket, previous_end: str) -> subprocess.Popen[bytes]:
        numbers = [inherited.fileno() for inherited in self._sockets]
        state = {"parent_pipe": parent_pipe.fileno(), "sockets": numbers, "previous_end": previous_end}
        return subprocess.Popen(  # noqa: S603 - the command line of this process
            [sys.executable, *sys.orig_argv[1:]],
            env=os.environ | {_VARIABLE: json.dumps(state)},
            pass_fds=[parent_pipe.fileno(), *numbers],
            # Ctrl-C must not reach the child, because it ends a child that is still starting with a traceback.
            process_group=0,
        )

    def _wait(self, timeout_s: float | None, heartbeat: _Heartbeat | None = None) -> list[int]:
        """Wait for signals, heartbeats or the end of the child; return the shutdown signals."""
        sockets = [self._wakeup, *(heartbeat.sockets if heartbeat else ())]
        ready, _, _ = select.select(sockets, [], [], timeout_s)
        if heartbeat is not None:
            heartbeat.update(ready)
        numbers = self._wakeup.recv(64) if self._wakeup in ready else b""
        signals = [number for number in numbers if number in _FORWARDED_SIGNALS]
        if signals and not self._received:
            # Refuse new connections at once, and not only after the accepted requests are finished.
            for listening in self._sockets:
                listening.close()
        self._received += signals
        return signals

    def _pause(self, pause_s: float) -> None:
        """Wait, or return early at a shutdown signal. Other signals, such as that of the child's end, are ignored."""
        end_at = time.monotonic() + pause_s
        while not self._received and (left_s := end_at - time.monotonic()) > 0:
            self._wait(left_s)

    def _shutdown_exit_code(self, code: int) -> int:
        if code >= 0:
            return code
        if -code in self._received:
            # The child got the signal too, before it could handle it, so it had accepted no request.
            return 0
        return 128 + (self._received[1] if -code == signal.SIGKILL and len(self._received) > 1 else -code)


class _Heartbeat:
    """The heartbeat of a child, in numbers of checks and not in time, because the machine may sleep meanwhile."""

    def __init__(self, parent_pipe: socket.socket, timeout_s: float) -> None:
        self.sockets = [parent_pipe]
        self._max_missed = timeout_s / HEARTBEAT_EVERY_S
        self._missed: int | None = None
        """Checks since the last heartbeat. None before the first one, because the start takes any time."""
        self._next_check = time.monotonic() + HEARTBEAT_EVERY_S

    @property
    def is_lost(self) -> bool:
        return self._missed is not None and self._missed > self._max_missed

    @property
    def next_check_s(self) -> float | None:
        """Time until the next check in seconds, or None if there is nothing to check yet."""
        return None if self._missed is None else max(0.0, self._next_check - time.monotonic())

    def update(self, ready: Sequence[socket.socket]) -> None:
        """Receive heartbeats, and count a check if one is due."""
        is_due = time.monotonic() >= self._next_check
        if is_due:
            self._next_check = time.monotonic() + HEARTBEAT_EVERY_S
        for parent_pipe in self.sockets:
            if parent_pipe not in ready:
                continue
            with suppress(ConnectionResetError):
                if parent_pipe.recv(4096):
                    self._missed = 0
                    return
            # The child has closed its end, and is about to end.
            self.sockets, self._missed = [], None
        if is_due and self._missed is not None:
            self._missed += 1


def _describe_exit(code: int) -> str:
    if code == HUNG_EXIT:
        return "ended because a model hung or lost its GPU"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}" + (" (most often: not enough memory)" if name == "SIGKILL" else "")
