"""`EMB_PROVIDER_SUPERVISE=true`: a small process that keeps the port open, and a service running behind it.

It opens the listening sockets, and starts the service as a child that inherits them. A child that crashes, or ends
itself because a model hangs (`HUNG_EXIT`), is started again. Connections made meanwhile wait in the sockets' backlog:
none is refused. Any other end of the child is the supervisor's own, with the same exit code.

The child's event loop sends a byte a second; a child that is silent for too long, since its event loop is stuck or a
native call holds Python's lock for good, is aborted, which leaves its stacks on stderr, and started again.

Signals are passed on as bytes over a pair of sockets, the lifeline, and not as signals: who signals a whole group of
processes, as a terminal and systemd do, would otherwise stop the child twice, which means at once. When the supervisor
is gone, however that came, the lifeline is closed, and the child stops too.
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
    from types import FrameType

logger = logging.getLogger(__name__)

HUNG_EXIT = 70
"""The exit code (EX_SOFTWARE) of a service that wants to be started again."""
BEAT_EVERY_S = 1.0
SHORTEST_SILENCE_S = 20.0
"""A busy machine may keep an event loop from running for seconds; so may importing a large library."""
_VARIABLE = "_EMB_PROVIDER_SUPERVISED"
"""In the child's environment: what it was handed. Not a setting, hence its name."""
_SETTLED_S = 60.0
"""A child that lived this long did not die of its start."""
_PAUSES_S = (0, 1, 2, 4, 8, 16, 30)
"""Before a child is started again, by how many in a row died of their start."""
_KILL_AFTER_S = 5.0
"""How long a child may take to end at once."""
_PASSED_ON = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class InheritedState:
    """What a supervisor hands to the service that it starts."""

    parent_pipe: socket.socket
    """A byte to the child is the number of a signal, one from it a sign of life; the end of it is the supervisor's."""
    sockets: list[socket.socket]
    """They listen already."""
    after: str
    """How the service before this one ended; empty for the first."""

    def beat(self) -> None:
        """Tell the supervisor that this process's event loop runs; call it every `BEAT_EVERY_S` seconds."""
        with suppress(
            OSError
        ):  # enough of them are waiting, or the supervisor is gone: `ShutdownSignal` sees to that
            self.parent_pipe.send(b"\0", socket.MSG_DONTWAIT)


def take_inherited_state() -> InheritedState | None:
    """Take what a supervisor handed to this process; None where none started it. Nothing else inherits it from here."""
    text = os.environ.pop(_VARIABLE, None)
    if text is None:
        return None
    told = json.loads(text)
    parent_pipe, *sockets = (socket.socket(fileno=number) for number in (told["lifeline"], *told["sockets"]))
    for one in (parent_pipe, *sockets):
        one.set_inheritable(False)
    return InheritedState(parent_pipe, sockets, told["after"])


class Supervisor:
    """Starts the command line of this very process again as the service. Used once, on the main thread."""

    def __init__(self, sockets: Sequence[socket.socket], silence_s: float = SHORTEST_SILENCE_S) -> None:
        """`sockets` listen, and are closed as soon as the service is told to stop.

        `silence_s`: how long a child that has shown a sign of life may go without another.
        """
        self._sockets = sockets
        self._silence_s = silence_s
        self._asked: list[int] = []
        """The signals to stop that came, in order."""
        # Signals only ring: they are looked at between two steps, and never in the middle of one.
        self._bell, self._ringer = socket.socketpair()
        self._bell.setblocking(False)
        self._ringer.setblocking(False)
        signal.set_wakeup_fd(self._ringer.fileno(), warn_on_full_buffer=False)
        for number in (*_PASSED_ON, signal.SIGCHLD):
            signal.signal(number, _ring)

    def run(self) -> int:
        """Keep the service running until it ends in good order, or is told to; return the exit code."""
        early_deaths, after = 0, ""
        while True:
            started = time.monotonic()
            try:
                code = self._run_child(after)
                how = _words(code)
            except OSError as error:
                code, how = HUNG_EXIT, f"could not be started ({error})"
            lived_s = time.monotonic() - started
            if self._asked:
                return self._code_of_stop(code)
            if code >= 0 and code != HUNG_EXIT:
                logger.log(
                    logging.ERROR if code else logging.INFO, "the service %s: so does its supervisor", how
                )
                return code
            early_deaths = early_deaths + 1 if lived_s < _SETTLED_S else 1
            pause_s = _PAUSES_S[min(early_deaths, len(_PAUSES_S)) - 1]
            after = f"{how} after {lived_s:.1f} s"
            when = f"in {pause_s:g} s" if pause_s else "at once"
            logger.error("the service %s: it is started again %s", after, when)
            self._pause(pause_s)
            if self._asked:
                return 0

    def _run_child(self, after: str) -> int:
        """Start the service and wait for its end; return its exit code, negative for a signal. Raises: OSError."""
        parent_pipe, its_end = socket.socketpair()
        with parent_pipe:
            with its_end:
                child = self._start(its_end, after)
            logger.info("the service is process %d", child.pid)
            pulse = _Heartbeat(parent_pipe, self._silence_s)
            kill_at: float | None = None
            while (code := child.poll()) is None:
                left_s = pulse.look_again_s if kill_at is None else max(0.0, kill_at - time.monotonic())
                for number in self._listen_for_signals(left_s, pulse):
                    with suppress(OSError):  # it has just ended
                        parent_pipe.send(bytes([number]))
                if kill_at is not None and time.monotonic() >= kill_at:
                    logger.error("the service did not end within %.0f s: it is killed", _KILL_AFTER_S)
                    child.kill()
                    child.wait()
                elif kill_at is None and len(self._asked) > 1:
                    kill_at = time.monotonic() + _KILL_AFTER_S
                elif kill_at is None and not self._asked and pulse.is_gone():
                    logger.error(
                        "the service gave no sign of life for %.0f s: it is aborted", self._silence_s
                    )
                    child.send_signal(signal.SIGABRT)  # which writes the stacks of all threads first
                    kill_at = time.monotonic() + _KILL_AFTER_S
            return code

    def _start(self, parent_pipe: socket.socket, after: str) -> subprocess.Popen[bytes]:
        numbers = [one.fileno() for one in self._sockets]
        told = {"lifeline": parent_pipe.fileno(), "sockets": numbers, "after": after}
        return subprocess.Popen(  # noqa: S603 - ourselves once more
            [sys.executable, *sys.orig_argv[1:]],
            env=os.environ | {_VARIABLE: json.dumps(told)},
            pass_fds=[parent_pipe.fileno(), *numbers],
            # Ctrl-C is for us: before the service is ready for it, it would end it with a traceback.
            process_group=0,
        )

    def _listen_for_signals(self, timeout_s: float | None, pulse: _Heartbeat | None = None) -> list[int]:
        """Wait for a signal, the end of the child among them; return those that are to be passed on."""
        ready, _, _ = select.select([self._bell, *(pulse.ends if pulse else ())], [], [], timeout_s)
        if pulse is not None:
            pulse.feel(ready)
        new = (
            [number for number in self._bell.recv(64) if number in _PASSED_ON] if self._bell in ready else []
        )
        if new and not self._asked:
            # Who connects from now on is refused at once, and not only when the last accepted request is finished.
            for one in self._sockets:
                one.close()
        self._asked += new
        return new

    def _pause(self, pause_s: float) -> None:
        """Wait, unless told to stop. What rings may be no more than the end of the child that is known already."""
        end_at = time.monotonic() + pause_s
        while not self._asked and (left_s := end_at - time.monotonic()) > 0:
            self._listen_for_signals(left_s)

    def _code_of_stop(self, code: int) -> int:
        if code >= 0:
            return code
        if (
            -code in self._asked
        ):  # sent to the child too, before it was ready for it: it had accepted nothing yet
            return 0
        return 128 + (self._asked[1] if -code == signal.SIGKILL and len(self._asked) > 1 else -code)


class _Heartbeat:
    """A child's signs of life.

    Silence is counted in looks at it, each `BEAT_EVERY_S` seconds: while the whole machine sleeps, nobody looks.
    """

    def __init__(self, parent_pipe: socket.socket, silence_s: float) -> None:
        self.ends = [parent_pipe]
        """What to wait for."""
        self._most = silence_s / BEAT_EVERY_S
        self._silent: int | None = None
        """Looks since the last beat; None before the first, since a start takes as long as it takes."""
        self._next_look = time.monotonic() + BEAT_EVERY_S

    @property
    def look_again_s(self) -> float | None:
        return None if self._silent is None else max(0.0, self._next_look - time.monotonic())

    def feel(self, ready: Sequence[socket.socket]) -> None:
        """Take in what there is, and count a look that is due."""
        due = time.monotonic() >= self._next_look
        if due:
            self._next_look = time.monotonic() + BEAT_EVERY_S
        for end in self.ends:
            if end not in ready:
                continue
            with suppress(ConnectionResetError):
                if end.recv(4096):
                    self._silent = 0
                    return
            # It has closed its end, and is about to end itself.
            self.ends, self._silent = [], None
        if due and self._silent is not None:
            self._silent += 1

    def is_gone(self) -> bool:
        return self._silent is not None and self._silent > self._most


def _ring(number: int, frame: FrameType | None) -> None:
    """Do nothing: that there is a handler makes the signal write to the wakeup descriptor."""


def _words(code: int) -> str:
    if code == HUNG_EXIT:
        return "ended because it hung"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"was killed by {name}" + (" (most often: not enough memory)" if name == "SIGKILL" else "")
