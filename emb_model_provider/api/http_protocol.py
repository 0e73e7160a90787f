"""The HTTP/1.1 protocol of the server: uvicorn's, with corrections for which uvicorn has no setting.

- Requests that ask for an upgrade to HTTP/2 (`Upgrade: h2c`), as Java's HttpClient and so Spring AI send them, are
  answered in HTTP/1.1 (RFC 9110, 7.8). uvicorn with httptools loses the body of such a request.
- Invalid HTTP is answered with an error in OpenAI's form and with a request id.
- The head and the body of a response are written together, because two writes take 1.5 times as long as one.
- Each connection takes bounded memory and time: uvicorn limits neither the time in which a request arrives, nor the
  size of its head, nor the number of pipelined requests.
"""

from __future__ import annotations

import asyncio
import logging
import select
import socket
import struct
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import httptools
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from emb_model_provider.api.errors import error_response
from emb_model_provider.api.limits import CONNECTIONS, RECEIVE_TIMED_OUT
from emb_model_provider.api.paths import is_upload, normalize_path
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
"""How many requests of a connection can wait for earlier ones. Clients rarely send more than one ahead."""

_UPLOAD_STEP_BYTES = 1000**2
"""A client that uploads a file has the time of a request for each of these."""
_MIN_TIMER_S = 0.001
_CHECK_PEER_S = 0.25
_PEER_CLOSED = getattr(select, "POLLRDHUP", 0) | getattr(select, "POLLHUP", 0) | getattr(select, "POLLERR", 0)
"""What `poll` reports of a connection that its client has closed, on Linux also while there is data to read."""


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
        self._limiter: ConnectionLimiter = app_state[CONNECTIONS]
        self._timer: asyncio.TimerHandle | None = None
        self._peer_timer: asyncio.TimerHandle | None = None
        self._active: RequestResponseCycle | None = None
        """The request that is being answered, or was answered last. Later ones are in `self.pipeline`."""
        self._waiting_since = 0.0
        """When the connection began to wait for its client: to send a request, to complete one, or to read."""
        self._is_receiving = False
        """Whether a request has begun and is not complete."""
        self._bytes_outside_body = 0
        """Bytes received since the last request, or since the last piece of the current request's body."""
        self._upload_bytes: int | None = None
        """Bytes of a file that arrived since the wait for the client began; None if the request is no upload."""
        self._unsent = 0
        """How many bytes waited for the client at the last check."""
        self._has_stopped_reading = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        super().connection_made(transport)
        self.flow = PipelineFlowControl(transport, self.pipeline)
        self._waiting_since = self.loop.time()
        self._timer = self.loop.call_later(self._limiter.receive_timeout_s, self._check_timeout)

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._timer, self._peer_timer):
            if timer is not None:
                timer.cancel()
        self._limiter.on_resumed(self)
        self._limiter.on_closed()
        super().connection_lost(exc)
        # uvicorn notifies only the request that came last.
        if self._active is not None and not self._active.response_complete:
            self._active.disconnected = True
            self._active.message_event.set()

    # --- reading ------------------------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._has_stopped_reading:
            return
        self._bytes_outside_body += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self.parser.get_method() == b"CONNECT":
                self._reject(400, "This is not a valid HTTP request.", "invalid_http")
            else:
                self._parse_again_without_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError:
            if not self._has_stopped_reading:
                self._reject(400, "This is not a valid HTTP request.", "invalid_http")
        if (
            self._is_receiving
            and not self._has_stopped_reading
            and (self._bytes_outside_body > MAX_HEADER_BYTES or len(self.headers) > MAX_HEADERS)
        ):
            self._reject_headers()

    # A request that asks for an upgrade is not started: it is parsed again without its Upgrade header.

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED_REQUESTS:
            # The client has to repeat requests that are unanswered when the connection ends (RFC 9112, 9.3.2).
            self._has_stopped_reading = True
            self.cycle.keep_alive = False
            raise _StopParsingError
        super().on_message_begin()
        self._is_receiving = True
        if self.cycle is not None and self.cycle.response_complete:
            self._waiting_since = self.loop.time()

    def on_headers_complete(self) -> None:
        is_too_large = self._bytes_outside_body > MAX_HEADER_BYTES and (
            len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > MAX_HEADER_BYTES
        )
        if is_too_large or len(self.headers) > MAX_HEADERS:
            self._reject_headers()
            raise _StopParsingError
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            path = self.scope["path"]
            is_file = "files" in path and is_upload(self.scope["method"], normalize_path(path))
            self._upload_bytes = 0 if is_file else None
            if self.pipeline and self._peer_timer is None:
                self._peer_timer = self.loop.call_later(_CHECK_PEER_S, self._check_peer)

    def on_body(self, body: bytes) -> None:
        self._bytes_outside_body = 0
        if self._upload_bytes is not None:
            self._upload_bytes += len(body)
            if self._upload_bytes >= _UPLOAD_STEP_BYTES:
                self._upload_bytes, self._waiting_since = 0, self.loop.time()
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self._is_receiving = False
        self._bytes_outside_body = 0
        if self.cycle.response_complete:  # the request was rejected before it was complete
            self._waiting_since = self.loop.time()
        super().on_message_complete()

    def _parse_again_without_upgrade(self, rest: bytes) -> None:
        version = self.parser.get_http_version().encode()
        lines = [self.parser.get_method() + b" " + self.url + b" HTTP/" + version]
        lines += [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._bytes_outside_body = 0
        self.data_received(b"\r\n".join([*lines, b"", b""]) + rest)

    # --- responding ---------------------------------------------------------------------------------------

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._active = cycle
        cycle.transport = CoalescingTransport(cycle.transport, self.loop)
        super()._start_asgi_task(cycle, app)

    def shutdown(self) -> None:
        # uvicorn closes a connection whose response is complete, although its last piece may not be written yet.
        if self._active is not None and isinstance(self._active.transport, CoalescingTransport):
            self._active.transport.flush()
        super().shutdown()

    def on_response_complete(self) -> None:
        # Replaces uvicorn's, which creates a timer for each response, and starts the next request although the client
        # has not read this response.
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        if self.pipeline:
            # Then the event loop has tried to write the response, and knows whether the client reads.
            self.loop.call_soon(self._start_next_request)
        elif self.cycle.more_body:
            self.flow.resume_reading()  # the rest of a request that was rejected is read and dropped
        else:
            self._waiting_since = self.loop.time()
            self.flow.resume_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self.flow.pause_reading()
        self._unsent, self._waiting_since = self.unsent_bytes(), self.loop.time()
        self._limiter.on_paused(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._limiter.on_resumed(self)
        self._start_next_request()

    def _start_next_request(self) -> None:
        if self.flow.write_paused or self.transport.is_closing():
            return
        if not self._is_responding():
            self._waiting_since = self.loop.time()
            if self.pipeline:
                self._start_asgi_task(*self.pipeline.pop())
        self.flow.resume_reading()

    def _is_responding(self) -> bool:
        return self._active is not None and not self._active.response_complete

    def unsent_bytes(self) -> int:
        return self.transport.get_write_buffer_size()

    def abort(self) -> None:
        connection = self.transport.get_extra_info("socket")
        if connection is not None:
            with suppress(OSError):
                # Otherwise the operating system would try to send what it has buffered for minutes.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _check_peer(self) -> None:
        """Close the connection if the client has closed it: while requests wait in the pipeline, nothing is read."""
        self._peer_timer = None
        if not self.pipeline or self.transport.is_closing():
            return
        connection = self.transport.get_extra_info("socket")
        if connection is not None and hasattr(select, "poll"):
            poll = select.poll()
            poll.register(connection.fileno(), getattr(select, "POLLRDHUP", 0))
            if any(events & _PEER_CLOSED for _, events in poll.poll(0)):
                self.transport.close()
                return
        self._peer_timer = self.loop.call_later(_CHECK_PEER_S, self._check_peer)

    # --- timeouts -----------------------------------------------------------------------------------------

    def _check_timeout(self) -> None:
        """Time the connection out if the client is too slow; otherwise check again at the earliest possible time."""
        now = self.loop.time()
        # A wait that begins after this check cannot time out sooner.
        next_check_s = min(self._limiter.receive_timeout_s, float(self.timeout_keep_alive))
        timeout_s = self._timeout_s()
        if timeout_s is not None:
            left_s = self._waiting_since + timeout_s - now
            if left_s <= 0:
                self._time_out()
                self._waiting_since = now
            else:
                next_check_s = min(next_check_s, left_s)
        self._timer = self.loop.call_later(max(next_check_s, _MIN_TIMER_S), self._check_timeout)

    def _timeout_s(self) -> float | None:
        """Return how long the connection may wait for its client now, or None if it waits for the service."""
        if self.flow.write_paused or self.transport.is_closing():
            unsent = self.unsent_bytes()
            if unsent != self._unsent:  # the client is reading
                self._unsent, self._waiting_since = unsent, self.loop.time()
            return self._limiter.receive_timeout_s
        if self._is_responding() and (self.pipeline or self._active is None or not self._active.more_body):
            return None
        if self._is_receiving or self._active is None:
            return self._limiter.receive_timeout_s
        return self.timeout_keep_alive

    def _time_out(self) -> None:
        has_head = self.cycle is not None and self.cycle.scope is self.scope  # of the request that is being received
        if self.flow.write_paused or self.transport.is_closing() or self._has_stopped_reading:
            self.abort()
        elif self._active is not None and self._is_responding():
            if RECEIVE_TIMED_OUT in self._active.scope:
                self.abort()
            # The middleware waits for the rest of the body. It wakes up, and finds this key.
            self._active.scope[RECEIVE_TIMED_OUT] = True  # type: ignore[literal-required]  # servers add keys
            self._active.message_event.set()
        elif self._is_receiving and not has_head:
            self._reject(408, "The request was not sent in time.", "request_timeout")
        else:
            self.transport.close()

    # --- rejecting ----------------------------------------------------------------------------------------

    def _reject_headers(self) -> None:
        self._reject(431, "The request headers are too large.", "headers_too_large")

    def _reject(self, status: int, message: str, code: str) -> None:
        """Send an error without calling the application, unless a response is in progress; then close the connection."""
        self._has_stopped_reading = True
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
        response = error_response(status, message, type="invalid_request_error", code=code, headers=headers)
        head = b"".join(name + b": " + value + b"\r\n" for name, value in response.raw_headers)
        self.transport.write(STATUS_LINE[status] + head + b"\r\n" + bytes(response.body))
        self.transport.close()
        # In place of an access line.
        logger.info("rejected an invalid or incomplete request: status=%d %s request_id=%s", status, code, identifier)


class PipelineFlowControl(FlowControl):
    """Flow control that reads nothing while requests wait in the pipeline, or responses wait for the client."""

    def __init__(self, transport: asyncio.Transport, pipeline: Sized) -> None:
        super().__init__(transport)
        self._pipeline = pipeline

    def resume_reading(self) -> None:
        if self.read_paused and not self.write_paused and not self._pipeline:
            super().resume_reading()


class CoalescingTransport(asyncio.Transport):
    """Delays a write until the next one, or until the next turn of the event loop, and writes both at once."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._pending = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self._pending:
            self._transport.write(self._pending + data)
            self._pending = b""
        elif data:
            self._pending = bytes(data)
            self._loop.call_soon(self.flush)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def flush(self) -> None:
        if self._pending:
            self._transport.write(self._pending)
            self._pending = b""


class _StopParsingError(Exception):
    """Raised in callbacks of the parser after the connection has been dealt with."""
