"""Limits that all clients share: connections, request bodies, and responses that clients do not read."""

from __future__ import annotations

import logging
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from emb_model_provider.errors import QueueFullError
from emb_model_provider.formatting import format_size

if sys.platform != "win32":
    import resource

if TYPE_CHECKING:
    from emb_model_provider.settings import LimitSettings

logger = logging.getLogger(__name__)

CONNECTIONS = "emb_provider.connections"
"""Key of the `ConnectionLimiter` in the application's lifespan state, where `http_protocol.py` finds it."""
RECEIVE_TIMED_OUT = "emb_provider.receive_timed_out"
"""Key that is set in a request's scope if the client took too long to send the request."""

_MAX_CONNECTIONS = 4096
_RESERVED_FILES = 256
"""Open files and sockets that are not client connections: models, logs, hubs."""
_RETRY_AFTER_S = 1.0
_WARN_EVERY_S = 10.0


class BodyBudget:
    """A bound on the bytes of all request bodies that are held at one moment.

    A request that does not fit is rejected instead of delayed, because otherwise clients that send slowly could block
    all others.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._reserved = 0

    def check(self, size: int) -> None:
        """Raise QueueFullError if a body of `size` bytes does not fit now."""
        if self._reserved + size > self._max_bytes:
            raise QueueFullError(
                f"The bodies of all current requests exceed {format_size(self._max_bytes)}. Try again later.",
                retry_after_s=_RETRY_AFTER_S,
            )

    def reserve(self, size: int) -> None:
        self.check(size)
        self._reserved += size

    def release(self, size: int) -> None:
        self._reserved -= size


class Connection(Protocol):
    """A connection with responses that its client has not read yet."""

    def unsent_bytes(self) -> int: ...

    def abort(self) -> None: ...


class ConnectionLimiter:
    """Limits that all connections of one service share."""

    def __init__(self, limits: LimitSettings) -> None:
        self.receive_timeout_s = limits.receive_timeout_s
        self._max_connections = _raise_file_limit()
        self._warned_at = float("-inf")
        # Unread responses get the same budget as request bodies: they take as much memory, and are larger.
        self._max_unsent_bytes = limits.max_pending_body_bytes
        self._paused: dict[Connection, None] = {}
        """Connections whose clients read too slowly, longest first."""

    def is_over_limit(self, open_connections: int) -> bool:
        """Return whether the newest of the open connections must be rejected; log a warning now and then if so."""
        if open_connections <= self._max_connections:
            return False
        now = time.monotonic()
        if now > self._warned_at + _WARN_EVERY_S:
            self._warned_at = now
            logger.warning("%d connections are open: new connections are rejected with 503", self._max_connections)
        return True

    def on_paused(self, connection: Connection) -> None:
        """Abort the connections that were paused first, but never all, if more bytes are unsent than the limit."""
        self._paused[connection] = None
        unsent = sum(paused.unsent_bytes() for paused in self._paused)
        while unsent > self._max_unsent_bytes and len(self._paused) > 1:
            longest = next(iter(self._paused))
            unsent -= longest.unsent_bytes()
            del self._paused[longest]
            longest.abort()

    def on_resumed(self, connection: Connection) -> None:
        self._paused.pop(connection, None)


def _raise_file_limit() -> int:
    """Raise the limit of open files as far as necessary, and return how many of them can be connections."""
    if sys.platform == "win32":
        return _MAX_CONNECTIONS
    wanted = _MAX_CONNECTIONS + _RESERVED_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return _MAX_CONNECTIONS
    if soft < wanted:
        # Not higher than necessary, because some libraries iterate over all possible file descriptors.
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    return min(_MAX_CONNECTIONS, max(soft - _RESERVED_FILES, soft // 2))
