"""An HTTP client that can also send slowly and disconnect early.

It is minimal, so that it takes little CPU time from the service.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

_MAX_IDLE_S = 30.0
"""Connections that were idle for longer are not used again, because the server may be closing them."""


class BrokenConnectionError(Exception):
    """The connection could not be made, or ended before the whole response was received."""


@dataclass(frozen=True, slots=True)
class Response:
    """An HTTP response."""

    status: int
    headers: dict[str, str]
    """By name in lower case."""
    body: bytes


@dataclass(slots=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    idle_since: float = 0.0
    """`time.monotonic()` at the end of the last response."""

    def is_usable(self) -> bool:
        is_open = not (self.reader.at_eof() or self.writer.is_closing())
        return is_open and time.monotonic() - self.idle_since < _MAX_IDLE_S


class Client:
    """Sends requests to one server over connections that are reused."""

    def __init__(self, port: int, *, timeout_s: float) -> None:
        self._port = port
        self._timeout_s = timeout_s
        self._idle: list[_Connection] = []

    async def request(
        self, method: str, path: str, body: bytes = b"", *, request_id: str = "", send_s: float = 0.0
    ) -> Response:
        """Send a request and return the response.

        Args:
            method: The HTTP method.
            path: The path of the URL.
            body: The body.
            request_id: The `X-Request-Id` header. Empty: none.
            send_s: The body is sent in pieces over this time, in seconds.

        Raises:
            BrokenConnectionError: The connection broke.
            TimeoutError: There was no response in time.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                connection = await self._connection()
                try:
                    await self._send(connection, _head(method, path, body, request_id), body, send_s)
                    response = await _read(connection.reader)
                except BaseException:
                    connection.writer.close()
                    raise
        except TimeoutError:
            raise
        except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
            raise BrokenConnectionError(f"{type(error).__name__}: {error}") from error
        if response.headers.get("connection", "").lower() == "close":
            connection.writer.close()
        else:
            connection.idle_since = time.monotonic()
            self._idle.append(connection)
        return response

    async def disconnect_early(self, path: str, body: bytes, *, sent_share: float, after_s: float) -> None:
        """Send a share of a request's body, wait, and close the connection without reading a response.

        Raises:
            BrokenConnectionError: The connection broke.
        """
        try:
            connection = await self._open()
            sent = body[: int(sent_share * len(body))]
            await self._send(connection, _head("POST", path, body, ""), sent, 0.0)
            await asyncio.sleep(after_s)
            connection.writer.close()
        except OSError as error:
            raise BrokenConnectionError(f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        for connection in self._idle:
            connection.writer.close()
        self._idle.clear()

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable():
                return connection
            connection.writer.close()
        return await self._open()

    async def _open(self) -> _Connection:
        return _Connection(*await asyncio.open_connection("127.0.0.1", self._port))

    @staticmethod
    async def _send(connection: _Connection, head: bytes, body: bytes, send_s: float) -> None:
        pieces = 10 if send_s else 1
        connection.writer.write(head)
        for number in range(pieces):
            connection.writer.write(body[number * len(body) // pieces : (number + 1) * len(body) // pieces])
            await connection.writer.drain()
            if send_s:
                await asyncio.sleep(send_s / pieces)


def _head(method: str, path: str, body: bytes, request_id: str) -> bytes:
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        *([f"X-Request-Id: {request_id}"] if request_id else []),
    ]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


async def _read(reader: asyncio.StreamReader) -> Response:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return Response(int(head[0].split(" ", 2)[1]), headers, body)
