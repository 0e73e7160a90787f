"""What all clients together may hold: connections, bodies of requests, and answers that nobody reads."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from emb_model_provider.errors import QueueFullError

if sys.platform != "win32":
    import resource

if TYPE_CHECKING:
    from emb_model_provider.settings import LimitSettings

logger = logging.getLogger(__name__)

CONNECTIONS = "emb_provider.connections"
"""Where the application's lifespan puts its `ConnectionLimiter` for `api/protocol.py` to find."""
RECEIVE_TIMED_OUT = "emb_provider.receive_timed_out"
"""A key that a request's scope gets when its client took too long to send it."""

_MAX_CONNECTIONS = 4096
_FILES_FOR_OTHERS = 256
"""Files and sockets that are not clients' connections: models, logs, hubs."""
_ROOM_AGAIN_S = 1.0
_TELL_AGAIN_S = 10.0


class BodyBudget:
    """Counts the bytes of all requests' bodies, from when they arrive until their request is over.

    A request is refused rather than made to wait: clients that send slowly could otherwise hold up all others.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._held = 0

    def check(self, size: int) -> None:
        """Raises: QueueFullError where a body of `size` bytes would not fit now."""
        if self._held + size > self._max_bytes:
            raise QueueFullError(
                f"The requests that are being read and answered hold {self._max_bytes / 1024 / 1024:g} MiB together: "
                "ask again.",
                retry_after_s=_ROOM_AGAIN_S,
            )

    def take(self, size: int) -> None:
        """Count `size` bytes that arrived.

        Raises: QueueFullError where there is no room for them; they are not counted then.
        """
        self.check(size)
        self._held += size

    def give_back(self, size: int) -> None:
        self._held -= size


class WriteBacklog(Protocol):
    """A connection as far as its answers are concerned."""

    def unsent_bytes(self) -> int:
        """Return how much of its answers waits in memory for the client to read."""

    def abort(self) -> None:
        """Close it at once; what was not sent is lost."""


class ConnectionLimiter:
    """What the connections of one service share."""

    def __init__(self, limits: LimitSettings) -> None:
        self.receive_timeout_s = limits.receive_timeout_s
        self._most = _connections_allowed()
        self._told_at = float("-inf")
        # An answer is as hard on memory as a body, and is larger than the body that asked for it.
        self._max_unsent_bytes = limits.max_pending_body_bytes
        self._slow: dict[WriteBacklog, None] = {}

    def too_many(self, open_now: int) -> bool:
        """Whether the newest of so many connections must be refused. The log says so, but not for each of a flood."""
        if open_now <= self._most:
            return False
        now = time.monotonic()
        if now > self._told_at + _TELL_AGAIN_S:
            self._told_at = now
            logger.warning("%d connections are open, and no more are taken: new ones get 503", self._most)
        return True

    def slow(self, connection: WriteBacklog) -> None:
        """Note that a client reads slower than it is answered; give up the slowest where all of them hold too much."""
        self._slow[connection] = None
        unsent = sum(each.unsent_bytes() for each in self._slow)
        while unsent > self._max_unsent_bytes and len(self._slow) > 1:
            longest = next(iter(self._slow))
            unsent -= longest.unsent_bytes()
            del self._slow[longest]
            longest.abort()

    def on_resumed(self, connection: WriteBacklog) -> None:
        self._slow.pop(connection, None)


def _connections_allowed() -> int:
    """Let this process open as many files as it may need, and return how many of them can be connections."""
    if sys.platform == "win32":
        return _MAX_CONNECTIONS
    wanted = _MAX_CONNECTIONS + _FILES_FOR_OTHERS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        # No higher than needed: some libraries walk through all numbers that a file could have.
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    if soft == resource.RLIM_INFINITY:
        return _MAX_CONNECTIONS
    return min(_MAX_CONNECTIONS, max(soft - _FILES_FOR_OTHERS, soft // 2))
