"""HTTP/1.1 as uvicorn reads and writes it, with corrections that it has no setting for.

- Java's HttpClient, and so Spring AI, asks with each request to a plain `http://` address to go on in HTTP/2
  (`Upgrade: h2c`). A server may ignore that (RFC 9110, 7.8); uvicorn with httptools loses the request's body.
- What is not HTTP at all is answered in OpenAI's form and with a request id, as everything else is.
- An answer's head and body are one write: two system calls and two packets are half as much again as one.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from emb_model_provider.api.errors import error_response
from emb_model_provider.observability.logs import new_request_id

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

logger = logging.getLogger(__name__)


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        cycle.transport = _JoinedWrites(cycle.transport, self.loop)
        super()._start_asgi_task(cycle, app)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self.parser.get_method() == b"CONNECT":
                self._refuse()
            else:
                self._read_again_without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            self._refuse()

    # A request that asks for another protocol is not begun: it is read again without that wish.

    def on_headers_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_message_complete(self) -> None:
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def _read_again_without_upgrade(self, rest: bytes) -> None:
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self.data_received(b"\r\n".join([*lines, b"", b""]) + rest)

    def _refuse(self) -> None:
        identifier = new_request_id()
        response = error_response(
            400, "This is not a valid HTTP request.", code="invalid_http",
            headers={"connection": "close", "x-request-id": identifier},
        )  # fmt: skip
        head = b"".join(name + b": " + value + b"\r\n" for name, value in response.raw_headers)
        self.transport.write(b"HTTP/1.1 400 Bad Request\r\n" + head + b"\r\n" + bytes(response.body))
        self.transport.close()
        logger.warning("refused what is not valid HTTP", extra={"fields": {"request_id": identifier}})


class _JoinedWrites(asyncio.Transport):
    """Holds a write back until the next one, or until the event loop's next turn, and writes both at once."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._held = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._held:
            self._transport.write(self._held + data)
            self._held = b""
        elif data:
            self._held = bytes(data)
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def _flush(self) -> None:
        if self._held:
            self._transport.write(self._held)
            self._held = b""
