"""A small process that keeps the port open and restarts the service (`EMB_PROVIDER_SUPERVISE=true`).

The service runs as a child process that inherits the listening sockets. It is restarted if it crashes, or exits with
`HUNG_EXIT` because a model hangs. Meanwhile new connections wait in the backlog of the sockets, so none is refused. If
the child ends in any other way, the supervisor exits with its exit code.

With EMB_PROVIDER_WORKERS there are several children, the workers, which share the sockets. Each has its own heartbeat, parent
pipe and restarts, so that the others answer while one is restarted. Shutdown signals are for all of them.

The event loop of a child sends a heartbeat: one byte per second. If it stops, because the loop is blocked or native
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from emb_model_provider.workers import Worker

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emb_model_provider.workers import WorkerGroup

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
    worker: Worker | None = None
    """Which of several workers this process is; None if it is the only one."""

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
    worker = None
    if (values := state["worker"]) is not None:
        worker = Worker(
            values["index"], values["count"], Path(values["directory"]), socket.socket(fileno=values["socket"])
        )
        worker.socket.set_inheritable(False)
    for inherited in (parent_pipe, *sockets):
        inherited.set_inheritable(False)
    return InheritedState(parent_pipe, sockets, state["previous_end"], worker)


class Supervisor:
    """Runs the command line of this process as one or several child processes. Used once, on the main thread."""

    def __init__(
        self, sockets: Sequence[socket.socket], timings: SupervisorTimings, group: WorkerGroup | None = None
    ) -> None:
        """Handle signals from now on. The sockets are closed as soon as the service is to shut down.

        With a group, each of its workers is a child; otherwise there is one child.
        """
        self._sockets = sockets
        self._timings = timings
        self._group = group
        self._children = [_Child("the service", None)]
        if group is not None:
            self._children = [_Child(f"worker {index}", index) for index in range(group.count)]
        self._received: list[int] = []
        """The received shutdown signals, in order."""
        self._code: int | None = None
        """Exit code of a child that ended by itself, which ends the service."""
        # Signals only write to a socket, so that they are handled between two steps and never within one.
        self._wakeup, self._wakeup_writer = socket.socketpair()
        self._wakeup.setblocking(False)
        self._wakeup_writer.setblocking(False)
        signal.set_wakeup_fd(self._wakeup_writer.fileno(), warn_on_full_buffer=False)
        for number in (*_FORWARDED_SIGNALS, signal.SIGCHLD):
            signal.signal(number, lambda *_: None)  # because signals without a handler are not written to the socket

    def run(self) -> int:
        """Keep the service running until it exits by itself or is shut down; return the exit code."""
        while True:
            for child in self._children:
                self._check(child)
            is_stopping = bool(self._received) or self._code is not None
            if is_stopping and all(child.process is None for child in self._children):
                return self._exit_code()
            self._wait()

    def _check(self, child: _Child) -> None:
        """Start a child if it is due, note its end, and end it if it does not respond."""
        now = time.monotonic()
        if child.process is None:
            if not self._received and self._code is None and now >= child.start_at:
                self._start(child)
            return
        code = child.process.poll()
        if code is not None:
            self._on_end(child, code, _describe_exit(code))
        elif child.kill_at is not None and now >= child.kill_at:
            logger.error("%s did not end within %.0f s, killing it", child.name, self._timings.kill_after_s)
            child.process.kill()
            child.process.wait()
            self._check(child)
        elif child.kill_at is None and len(self._received) > 1:
            child.kill_at = now + self._timings.kill_after_s
        elif child.kill_at is None and not self._received and child.heartbeat.is_lost:
            logger.error("%s sent no heartbeat for %.0f s, aborting it", child.name, self._timings.heartbeat_timeout_s)
            child.process.send_signal(signal.SIGABRT)  # faulthandler prints the stacks of all threads
            child.kill_at = now + self._timings.kill_after_s

    def _start(self, child: _Child) -> None:
        child.started_at = time.monotonic()
        child.parent_pipe, child_end = socket.socketpair()
        try:
            with child_end:
                child.process = self._create_process(child, child_end)
        except OSError as error:
            self._on_end(child, HUNG_EXIT, f"could not be started ({error})")
            return
        logger.info("%s is process %d", child.name, child.process.pid)
        child.heartbeat = _Heartbeat(child.parent_pipe, self._timings.heartbeat_timeout_s)

    def _create_process(self, child: _Child, parent_pipe: socket.socket) -> subprocess.Popen[bytes]:
        numbers = [inherited.fileno() for inherited in self._sockets]
        state = {
            "parent_pipe": parent_pipe.fileno(), "sockets": numbers, "previous_end": child.previous_end, "worker": None
        }  # fmt: skip
        environment, inherited = dict(os.environ), [parent_pipe.fileno(), *numbers]
        if self._group is not None and child.index is not None:
            private = self._group.sockets[child.index].fileno()
            inherited.append(private)
            directory = str(self._group.directory)
            state["worker"] = {
                "index": child.index, "count": self._group.count, "directory": directory, "socket": private
            }  # fmt: skip
            environment |= self._group.environment
        return subprocess.Popen(  # noqa: S603 - the command line of this process
            [sys.executable, *sys.orig_argv[1:]],
            env=environment | {_VARIABLE: json.dumps(state)},
            pass_fds=inherited,
            # Ctrl-C must not reach the child, because it ends a child that is still starting with a traceback.
            process_group=0,
        )

    def _on_end(self, child: _Child, code: int, end: str) -> None:
        """Note the end of a child: start it again later, or end the service."""
        child.process = child.kill_at = None
        child.parent_pipe.close()
        if self._group is not None and child.index is not None:
            self._group.shared.close_worker(child.index)
        if self._received or self._code is not None:
            child.code = code
            return
        if code >= 0 and code != HUNG_EXIT:
            logger.log(logging.ERROR if code else logging.INFO, "%s %s, exiting", child.name, end)
            self._code = code
            self._close_sockets()
            self._forward([signal.SIGTERM])
            return
        ran_s = time.monotonic() - child.started_at
        child.early_ends = child.early_ends + 1 if ran_s < self._timings.stable_after_s else 1
        pauses_s = self._timings.restart_pauses_s
        pause_s = pauses_s[min(child.early_ends, len(pauses_s)) - 1]
        child.previous_end = f"{end} after {ran_s:.1f} s"
        when = f"in {pause_s:g} s" if pause_s else "at once"
        logger.error("%s %s, restarting it %s", child.name, child.previous_end, when)
        child.start_at = time.monotonic() + pause_s

    def _wait(self) -> None:
        """Wait until there is something to do, and forward shutdown signals."""
        running = [child for child in self._children if child.process is not None]
        pipes = [pipe for child in running for pipe in child.heartbeat.sockets]
        ready, _, _ = select.select([self._wakeup, *pipes], [], [], self._next_check_s())
        for child in running:
            child.heartbeat.update(ready)
        numbers = self._wakeup.recv(64) if self._wakeup in ready else b""
        signals = [number for number in numbers if number in _FORWARDED_SIGNALS]
        if signals and not self._received:
            # Refuse new connections at once, and not only after the accepted requests are finished.
            self._close_sockets()
        self._received += signals
        self._forward(signals)

    def _next_check_s(self) -> float | None:
        """Return the time until the next child is to be started, checked or killed, or None if nothing is due."""
        now = time.monotonic()
        waits: list[float | None] = []
        for child in self._children:
            if child.kill_at is not None:
                waits.append(child.kill_at - now)
            elif child.process is not None:
                waits.append(child.heartbeat.next_check_s)
            elif not self._received and self._code is None:
                waits.append(child.start_at - now)
        return max(0.0, min(due)) if (due := [wait_s for wait_s in waits if wait_s is not None]) else None

    def _forward(self, signals: Sequence[int]) -> None:
        for child in self._children:
            if child.process is not None:
                with suppress(OSError):  # the child has just ended
                    child.parent_pipe.send(bytes(signals))

    def _close_sockets(self) -> None:
        for listening in self._sockets:
            listening.close()

    def _exit_code(self) -> int:
        if self._code is not None:
            return self._code
        codes = [self._shutdown_exit_code(child.code) for child in self._children if child.code is not None]
        return next((code for code in codes if code), 0)

    def _shutdown_exit_code(self, code: int) -> int:
        if code >= 0:
            return code
        if -code in self._received:
            # The child got the signal too, before it could handle it, so it had accepted no request.
            return 0
        return 128 + (self._received[1] if -code == signal.SIGKILL and len(self._received) > 1 else -code)


@dataclass(slots=True, eq=False)
class _Child:
    """A child process and its restarts."""

    name: str
    """How log lines call it."""
    index: int | None
    """Which worker it is; None if it is the only one."""
    process: subprocess.Popen[bytes] | None = None
    parent_pipe: socket.socket = field(init=False)
    heartbeat: _Heartbeat = field(init=False)
    start_at: float = 0.0
    """When it is to be started, on the monotonic clock."""
    started_at: float = 0.0
    kill_at: float | None = None
    early_ends: int = 0
    """How many consecutive processes ended early."""
    previous_end: str = ""
    code: int | None = None
    """How it ended during the shutdown: 0 or more is an exit code, less is a signal. None if it did not run."""


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
