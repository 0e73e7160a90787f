"""Limits of request bodies, and those that all clients share: connections, and responses that clients do not read."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

import numpy as np

from emb_model_provider.errors import BodyTooLargeError, QueueFullError, RequestError
from emb_model_provider.formatting import format_size

if sys.platform != "win32":
    import resource

if TYPE_CHECKING:
    from emb_model_provider.settings import LimitSettings
    from emb_model_provider.workers import Worker

logger = logging.getLogger(__name__)

CONNECTIONS = "emb_provider.connections"
"""Key of the `ConnectionLimiter` in the application's lifespan state, where `http_protocol.py` finds it."""
MAY_ACCEPT = "emb_provider.may_accept"
"""Key of an event in the lifespan state of one of several workers, which is set when it may accept connections."""
RECEIVE_TIMED_OUT = "emb_provider.receive_timed_out"
"""Key that is set in a request's scope if the client took too long to send the request."""

_MAX_CONNECTIONS = 4096
_RESERVED_FILES = 256
"""Open files and sockets that are not client connections: models, logs, hubs."""
_RETRY_AFTER_S = 1.0
_QUOTE = ord('"')
_BEFORE_VALUES = np.zeros(256, dtype=np.uint8)
"""1 for each byte that is followed by a value in JSON, or by a key."""
_BEFORE_VALUES[list(b",:[{")] = 1
_VALUES_PER_INPUT, _OTHER_VALUES = 16, 10_000
"""Values of each input and of a whole request besides its token ids, with a margin: Cohere's API has 8 for each input."""
_WARN_EVERY_S = 10.0


def max_json_values(limits: LimitSettings) -> int:
    """Return how many values a body may have. A valid request has fewer."""
    return limits.max_request_tokens + _VALUES_PER_INPUT * limits.max_inputs + _OTHER_VALUES


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


class JsonValueCounter:
    """A bound on the number of values in the JSON of a request body, which is counted as the body arrives.

    A parser makes about 30 bytes of objects of each byte of `[[],[],…]`, and holds the interpreter's lock meanwhile. So
    nothing is parsed that has more values than a valid request. Bodies that have fewer bytes than that are not counted.
    """

    def __init__(self, max_values: int) -> None:
        self._max_values = max_values
        self._pieces: list[bytes] = []
        self._size = 0
        self._count = 0
        self._in_string = self._is_escaped = False

    def add(self, piece: bytes) -> None:
        """Count the values in a piece of the body.

        Raises:
            BodyTooLargeError: There are too many values.
            RequestError: The body is large and not UTF-8, so that its values cannot be counted.
        """
        self._pieces.append(piece)
        self._size += len(piece)
        if self._size > self._max_values:
            if self._count == 0 and 0 in b"".join(self._pieces)[:4]:
                raise RequestError("Encode the JSON body of your request in UTF-8.", code="invalid_json")
            while self._pieces:
                self._count_values(self._pieces.pop(0))
            if self._count > self._max_values:
                raise BodyTooLargeError(
                    f"The request body has more than {self._max_values} JSON values. Send fewer inputs per request."
                )

    def _count_values(self, piece: bytes) -> None:
        if self._is_escaped:
            piece = piece[1:]
        self._is_escaped = bool((len(piece) - len(piece.rstrip(b"\\"))) % 2)
        if b"\\" in piece:
            piece = piece.replace(b"\\\\", b"").replace(b'\\"', b"")
        if piece:
            data = np.frombuffer(piece, dtype=np.uint8)
            in_string = np.bitwise_xor.accumulate((data == _QUOTE).view(np.uint8)) ^ np.uint8(self._in_string)
            # Each value but the first one follows one of these characters.
            self._count += int(np.count_nonzero(_BEFORE_VALUES[data] & (in_string ^ 1)))
            self._in_string = bool(in_string[-1])


class Connection(Protocol):
    """A connection with responses that its client has not read yet."""

    def unsent_bytes(self) -> int: ...

    def abort(self) -> None: ...


class ConnectionLimiter:
    """Limits that all connections of one service share."""

    def __init__(self, limits: LimitSettings, worker: Worker | None = None) -> None:
        """Create the limits of the whole service, or of one of several workers, which has a share of the connections."""
        self._worker = worker.index if worker is not None else 0
        self._shared = worker.shared_memory() if worker is not None else None
        self.receive_timeout_s = limits.receive_timeout_s
        self.has_space = asyncio.Event()
        """Whether another connection can be accepted. Others wait in the queue of the operating system."""
        self.has_space.set()
        self._max_connections = max(1, _raise_file_limit() // (worker.count if worker is not None else 1))
        self._open = 0
        self._warned_at = float("-inf")
        # Unread responses get the same budget as request bodies: they take as much memory, and are larger.
        self._max_unsent_bytes = limits.max_pending_body_bytes
        self._paused: dict[Connection, None] = {}
        """Connections whose clients read too slowly, longest first."""

    def start_accepting(self) -> None:
        """Tell the other workers that this one accepts connections."""
        if self._shared is not None:
            self._shared.set_connections(self._worker, self._open)

    def excess(self) -> float:
        """Return how many connections this worker has more than the one with the fewest."""
        return self._shared.excess(self._worker) if self._shared is not None else 0

    def on_accepted(self) -> None:
        """Count a connection; log a warning now and then if no other one can be accepted."""
        self._open += 1
        if self._shared is not None:
            self._shared.set_connections(self._worker, self._open)
        if self._open < self._max_connections:
            return
        self.has_space.clear()
        now = time.monotonic()
        if now > self._warned_at + _WARN_EVERY_S:
            self._warned_at = now
            logger.warning("%d connections are open: further ones wait until others are closed", self._open)

    def on_closed(self) -> None:
        self._open -= 1
        if self._shared is not None:
            self._shared.set_connections(self._worker, self._open)
        self.has_space.set()

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
