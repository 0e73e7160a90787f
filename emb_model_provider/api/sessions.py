"""Sessions of the web console: browsers that have signed in, and the one-time link with which one of them can."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

IDLE_S = 12 * 3600
"""A session ends after this many seconds without a request, and with the service."""
_MAX_SESSIONS = 1000
"""If there are more, the one that was not used for the longest time ends."""
_TOKEN_BYTES = 32


class Sessions:
    """The sessions of one service. Only digests of their tokens are kept, in memory."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last_used: dict[bytes, float] = {}
        """By digest, the least recently used first."""
        self._link: bytes | None = None

    def open(self) -> str:
        """Open a session, and return its token."""
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        self._last_used[_digest(token)] = self._clock()
        if len(self._last_used) > _MAX_SESSIONS:
            del self._last_used[next(iter(self._last_used))]
        return token

    def is_open(self, token: str) -> bool:
        """Return whether a token is that of a session, and extend the session."""
        digest = _digest(token)
        last_used = self._last_used.pop(digest, None)
        if last_used is None or self._clock() - last_used > IDLE_S:
            return False
        self._last_used[digest] = self._clock()
        return True

    def close(self, token: str) -> None:
        self._last_used.pop(_digest(token), None)

    def create_link(self) -> str:
        """Return the token of a link that opens one session. An earlier link becomes invalid."""
        token = secrets.token_urlsafe(_TOKEN_BYTES)
        self._link = _digest(token)
        return token

    def redeem(self, token: str) -> bool:
        """Return whether a token is that of the link, which becomes invalid."""
        if self._link is None or not hmac.compare_digest(_digest(token), self._link):
            return False
        self._link = None
        return True


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
