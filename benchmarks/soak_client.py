"""An HTTP client that can also misbehave: hang up, dawdle. Light, so that it takes little from the server's cores."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

_IDLE_S = 30.0
"""A connection that was idle for longer is not used again, as with other clients: a server may be closing it."""


class BrokenError(Exception):
    """The connection ended before the whole answer, or could not be made."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    idle_since: float = 0.0
    """On the monotonic clock, seconds."""

    def is_open(self) -> bool:
        return not (self.reader.at_eof() or self.writer.is_closing())


class Client:
    """Asks one server, over connections that are kept for the next request."""

    def __init__(self, port: int, *, timeout_s: float) -> None:
        self._port = port
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []

    async def ask(
        self, method: str, path: str, body: bytes = b"", *, request_id: str = "", takes_s: float = 0.0
    ) -> Reply:
        """Return the answer. The body is sent in pieces over `takes_s` seconds.

        Raises: BrokenError; TimeoutError.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connection()
                try:
                    await self._send(connection, _head(method, path, body, request_id), body, takes_s)
                    reply = await _read(connection.reader)
                except BaseException:
                    connection.writer.close()
                    raise
        except TimeoutError:
            raise
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            raise BrokenError(f"{type(error).__name__}: {error}") from error
        if reply.headers.get("connection", "").lower() == "close":
            connection.writer.close()
        else:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        return reply

    async def hang_up(self, path: str, body: bytes, *, after_s: float, sent: float) -> None:
        """Send this share of a request's body, wait, and close the connection without having read an answer."""
        try:
            connection = await self._open()
            await self._send(connection, _head("POST", path, body, ""), body[: int(sent * len(body))], 0.0)
            await asyncio.sleep(after_s)
            connection.writer.close()
        except OSError as error:
            raise BrokenError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        for connection in self._idle:
            connection.writer.close()
        self._idle.clear()

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open() and time.monotonic() - connection.idle_since < _IDLE_S:
                return connection
            connection.writer.close()
        return await self._open()

    async def _open(self) -> _Connection:
        return _Connection(*await asyncio.open_connection("127.0.0.1", self._port))

    @staticmethod
    async def _send(connection: _Connection, head: bytes, body: bytes, takes_s: float) -> None:
        pieces = 10 if takes_s else 1
        connection.writer.write(head)
        for number in range(pieces):
            connection.writer.write(body[number * len(body) // pieces : (number + 1) * len(body) // pieces])
            await connection.writer.drain()
            if takes_s:
                await asyncio.sleep(takes_s / pieces)


def _head(method: str, path: str, body: bytes, request_id: str) -> bytes:
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *([f"X-Request-Id: {request_id}"] if request_id else []),
    ]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


async def _read(reader: asyncio.StreamReader) -> Reply:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {
        name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])
    }
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Reply(int(head[0].split(" ", 2)[1]), headers, body)
