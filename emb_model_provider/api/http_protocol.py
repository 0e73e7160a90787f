"""HTTP/1.1 as uvicorn reads and writes it, with corrections that it has no setting for.

- Java's HttpClient, and so Spring AI, asks with each request to a plain `http://` address to go on in HTTP/2
  (`Upgrade: h2c`). A server may ignore that (RFC 9110, 7.8); uvicorn with httptools loses the request's body.
- What is not HTTP at all is answered in OpenAI's form and with a request id, as everything else is.
- An answer's head and body are one write: two system calls and two packets are half as much again as one.
- A client costs bounded memory and time, however slowly it sends or reads and however much it sends ahead. uvicorn
  limits neither the time a request takes to arrive, nor a request's head, nor how many requests wait in a connection.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from emb_model_provider.api.errors import RETRY_SOON, error_response
from emb_model_provider.api.limits import CONNECTIONS, RECEIVE_TIMED_OUT
from emb_model_provider.observability.logs import new_request_id

if TYPE_CHECKING:
    from collections.abc import Sized

    from uvicorn._types import ASGI3Application
    from uvicorn.config import Config
    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle
    from uvicorn.server import ServerState

    from emb_model_provider.api.limits import ConnectionLimiter


logger = logging.getLogger(__name__)

MAX_HEADER_BYTES = 32 * 1024
MAX_HEADERS = 100
MAX_PIPELINED_REQUESTS = 16
"""Requests that wait in a connection for earlier ones. Clients hardly ever send more than one ahead."""


class _StopParsingError(Exception):
    """Raised in one of the parser's callbacks, which has said what is to become of the connection."""


class HttpProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._shared: ConnectionLimiter = app_state[CONNECTIONS]
        self._timer: asyncio.TimerHandle | None = None
        self._active: RequestResponseCycle | None = None
        """The request that is or was answered last; those behind it are in `self.pipeline`."""
        self._since = 0.0
        """When that began for which the connection waits: a request, the rest of one, or a client that reads."""
        self._receiving = False
        """Whether a request has begun that is not whole."""
        self._without_body = 0
        """Bytes since the last request, or since the last piece of this one's body."""
        self._unsent = 0
        self._ended = False
        """Nothing more is read."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        super().connection_made(transport)
        self.flow = Flow(transport, self.pipeline)
        self._since = self.loop.time()
        if self._shared.too_many(len(self.connections)):
            self._refuse(503, "There are too many connections.", "too_many_connections")
        else:
            self._timer = self.loop.call_later(self._shared.receive_timeout_s, self._check_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._shared.on_resumed(self)
        super().connection_lost(exc)
        # uvicorn tells only the request that came last.
        if self._active is not None and not self._active.response_complete:
            self._active.disconnected = True
            self._active.message_event.set()

    # --- reading ------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        self._without_body += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self.parser.get_method() == b"CONNECT":
                self._refuse(400, "This is not a valid HTTP request.", "invalid_http")
            else:
                self._read_again_without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            if not self._ended:
                self._refuse(400, "This is not a valid HTTP request.", "invalid_http")
        if (
            self._receiving
            and not self._ended
            and (self._without_body > MAX_HEADER_BYTES or len(self.headers) > MAX_HEADERS)
        ):
            self._refuse_head()

    # A request that asks for another protocol is not begun: it is read again without that wish.

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED_REQUESTS:
            # RFC 9112, 9.3.2: who sends ahead has to send again what was not answered when the connection ends.
            self._ended = True
            self.cycle.keep_alive = False
            raise _StopParsingError
        super().on_message_begin()
        self._receiving = True
        if self.cycle is not None and self.cycle.response_complete:
            self._since = self.loop.time()

    def on_headers_complete(self) -> None:
        if len(self.headers) > MAX_HEADERS or (
            self._without_body > MAX_HEADER_BYTES and _size(self.url, self.headers) > MAX_HEADER_BYTES
        ):
            self._refuse_head()
            raise _StopParsingError
        if not self.parser.should_upgrade():
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._without_body = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._receiving = False
        self._without_body = 0
        if self.cycle.response_complete:  # it was refused before it was whole
            self._since = self.loop.time()
        super().on_message_complete()

    def _read_again_without_upgrade(self, rest: bytes) -> None:
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._without_body = 0
        self.data_received(b"\r\n".join([*lines, b"", b""]) + rest)

    # --- answering ----------------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._active = cycle
        cycle.transport = CoalescingTransport(cycle.transport, self.loop)
        super()._start_asgi_task(cycle, app)

    def shutdown(self) -> None:
        # uvicorn closes the connection under an answer that is complete, though its last piece may be held back.
        if self._active is not None and isinstance(self._active.transport, CoalescingTransport):
            self._active.transport.flush()
        super().shutdown()

    def on_response_complete(self) -> None:
        # Instead of uvicorn's, which makes a timer for each answer and begins the next one though this is not read.
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.pipeline:
            # By then the loop has tried to write the answer, and knows whether the client reads.
            self.loop.call_soon(self._start_next_request)
        elif self.cycle.more_body:
            self.flow.resume_reading()  # the rest of a request that was refused is read, and dropped
        else:
            self._since = self.loop.time()
            self.flow.resume_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.flow.pause_reading()
        self._unsent, self._since = self.unsent_bytes(), self.loop.time()
        self._shared.slow(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._shared.on_resumed(self)
        self._start_next_request()

    def _start_next_request(self) -> None:
        if self.flow.write_paused or self.transport.is_closing():
            return
        if self._active is None or self._active.response_complete:
            self._since = self.loop.time()
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())
        self.flow.resume_reading()

    def unsent_bytes(self) -> int:
        return self.transport.get_write_buffer_size()

    def abort(self) -> None:
        connection = self.transport.get_extra_info("socket")
        if connection is not None:
            with suppress(OSError):
                # Else the system goes on trying to send what it has taken, for minutes.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    # --- giving up ----------------------------------------------------------------------------------------

    def _check_timeout(self) -> None:
        """Give the connection up if the client takes too long; else look again when it could."""
        now = self.loop.time()
        # No wait that begins from now on can end sooner than this.
        next_look_s = min(self._shared.receive_timeout_s, float(self.timeout_keep_alive))
        allowed_s = self._timeout_s()
        if allowed_s is not None:
            left_s = self._since + allowed_s - now
            if left_s <= 0:
                self._give_up()
                self._since = now
            else:
                next_look_s = min(next_look_s, left_s)
        self._timer = self.loop.call_later(max(next_look_s, 0.001), self._check_timeout)

    def _timeout_s(self) -> float | None:
        """Return how long the client may take for what it has to do now; None where it is the service's turn."""
        if self.flow.write_paused or self.transport.is_closing():
            unsent = self.unsent_bytes()
            if unsent != self._unsent:  # it does read
                self._unsent, self._since = unsent, self.loop.time()
            return self._shared.receive_timeout_s
        if self._is_working() and (self.pipeline or self._active is None or not self._active.more_body):
            return None
        if self._receiving or self._active is None:
            return self._shared.receive_timeout_s
        return self.timeout_keep_alive

    def _give_up(self) -> None:
        if self.flow.write_paused or self.transport.is_closing() or self._ended:
            self.abort()
        elif self._active is not None and self._is_working():
            if RECEIVE_TIMED_OUT in self._active.scope:
                self.abort()
            # The middleware asks for the rest of the body, gets nothing, and finds this.
            self._active.scope[RECEIVE_TIMED_OUT] = True  # type: ignore[literal-required]  # servers add keys
            self._active.message_event.set()
        elif self._receiving and not self._has_head():
            self._refuse(408, "The request was not sent in time.", "request_timeout")
        else:
            self.transport.close()

    def _is_working(self) -> bool:
        return self._active is not None and not self._active.response_complete

    def _has_head(self) -> bool:
        return self.cycle is not None and self.cycle.scope is self.scope

    def _refuse_head(self) -> None:
        self._refuse(431, "The request's headers are too large.", "headers_too_large")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer what is no request that can be read, unless something is being answered; then close."""
        self._ended = True
        active = self._active
        if active is not None and not active.response_complete and not active.more_body:
            self.pipeline.clear()
            active.keep_alive = False
            return
        if active is not None and active.response_started and not active.response_complete:
            self.transport.close()
            return
        identifier = new_request_id()
        headers = {"connection": "close", "x-request-id": identifier}
        kind = "invalid_request_error"
        if status >= 500:
            headers, kind = {**headers, **RETRY_SOON}, "server_error"
        response = error_response(status, message, type=kind, code=code, headers=headers)
        head = b"".join(name + b": " + value + b"\r\n" for name, value in response.raw_headers)
        self.transport.write(STATUS_LINE[status] + head + b"\r\n" + bytes(response.body))
        self.transport.close()
        if status < 500:
            # In place of an access line. Of connections that are too many, `limits.py` tells.
            logger.info(
                "refused what is no whole request: status=%d %s request_id=%s", status, code, identifier
            )


def _size(url: bytes, headers: list[tuple[bytes, bytes]]) -> int:
    return len(url) + sum(len(name) + len(value) for name, value in headers)


class Flow(FlowControl):
    """Reads no more while requests wait in the connection, or answers for the client."""

    def __init__(self, transport: asyncio.Transport, waiting: Sized) -> None:
        super().__init__(transport)
        self._waiting = waiting

    def resume_reading(self) -> None:
        if self.read_paused and not self.write_paused and not self._waiting:
            super().resume_reading()


class CoalescingTransport(asyncio.Transport):
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
            self._loop.call_soon(self.flush)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def flush(self) -> None:
        """Write what is held back."""
        if self._held:
            self._transport.write(self._held)
            self._held = b""
