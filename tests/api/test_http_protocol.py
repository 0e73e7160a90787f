"""HTTP/1.1 on the level of connections, valid or not: every response has OpenAI's form and a request id."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING

import pytest
import uvicorn
from uvicorn.server import ServerState

from emb_model_provider.api.http_protocol import HttpProtocol
from emb_model_provider.api.limits import CONNECTIONS, ConnectionLimiter
from emb_model_provider.settings import LimitSettings
from tests.api.helpers import connect

if TYPE_CHECKING:
    import socket

    from starlette.types import Receive, Scope, Send

    from tests.service import Service

BODY = b'{"input": "hello", "encoding_format": "base64"}'
HOST = b"Host: localhost\r\n"


class RawResponse:
    """A response as it was received, and whether the server closed the connection after it."""

    def __init__(self, raw: bytes) -> None:
        head, _, self.body = raw.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        self.status = int(lines[0].split()[1]) if raw else 0
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
        self.closed = not raw

    def assert_error(self, status: int, code: str) -> None:
        assert self.status == status
        assert self.headers["x-request-id"]
        assert self.headers["content-type"] == "application/json"
        error = json.loads(self.body)["error"]
        assert (error["code"], error["type"]) == (code, "invalid_request_error")
        assert set(error) == {"message", "type", "param", "code"}


def exchange(service: Service, *pieces: bytes) -> RawResponse:
    """Send bytes piece by piece, and read one response."""
    with connect(service) as connection:
        for piece in pieces:
            connection.sendall(piece)
        response = _read(connection)
        response.closed = _is_closed(connection)
        return response


def _is_closed(connection: socket.socket) -> bool:
    """Return whether the server has closed a connection, by sending another request."""
    try:
        connection.sendall(b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n")
        return _read(connection).closed
    except ConnectionError:
        return True


def _read(connection: socket.socket) -> RawResponse:
    raw = b""
    while True:
        chunk = connection.recv(65536)
        raw = (raw + chunk).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", raw, re.IGNORECASE)
        _, end, body = raw.partition(b"\r\n\r\n")
        if not chunk or (end and length is not None and len(body) >= int(length.group(1))):
            return RawResponse(raw)


def post(*headers: bytes, version: bytes = b"1.1", body: bytes = BODY) -> bytes:
    """Return a request for embeddings."""
    lines = b"".join(header + b"\r\n" for header in headers)
    head = b"POST /v1/embeddings HTTP/" + version + b"\r\n" + HOST + lines
    return head + b"Content-Length: %d\r\n\r\n" % len(body) + body


def with_length(length: bytes) -> bytes:
    return post().replace(b"Length: %d" % len(BODY), b"Length: " + length)


# --- valid requests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [1, 30, 150, len(post()) - 1])
def test_request_in_two_pieces(service: Service, split: int) -> None:
    """A request can be split anywhere."""
    response = exchange(service, post()[:split], post()[split:])
    assert (response.status, response.closed) == (200, False)


def test_chunked_body(service: Service) -> None:
    """A body without Content-Length is read to its end."""
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY[:5], BODY[5:])) + b"0\r\n\r\n"
    response = exchange(
        service, b"POST /v1/embeddings HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks
    )
    assert response.status == 200


@pytest.mark.parametrize("length", [b"0" * 5000 + b"%d", b"0" * 30_000 + b"%d"])
def test_length_with_thousands_of_zeros_is_read(service: Service, length: bytes) -> None:
    """Python refuses to convert a number of more than 4,300 digits, leading zeros included."""
    assert exchange(service, with_length(length % len(BODY))).status == 200
    with connect(service) as connection:  # which stays open for the rest of the body
        connection.sendall(with_length(length % 10**18))
        _read(connection).assert_error(413, "request_too_large")


@pytest.mark.parametrize("digits", [20, 5000, 30_000])
def test_length_with_thousands_of_digits_is_rejected(service: Service, digits: int) -> None:
    """No server can read so much."""
    exchange(service, with_length(b"9" * digits)).assert_error(400, "invalid_http")


def test_http_1_0_without_a_host(service: Service) -> None:
    """Simple health checks and old clients are answered, and their connection is closed."""
    response = exchange(service, b"GET /health HTTP/1.0\r\n\r\n")
    assert (response.status, response.closed) == (200, True)
    assert exchange(service, post(version=b"1.0")).status == 200


def test_upgrade_to_http_2_is_ignored(service: Service) -> None:
    """Java's HttpClient (Spring AI) asks for HTTP/2 with each request, and is answered in HTTP/1.1."""
    upgrade = (
        b"Connection: Upgrade, HTTP2-Settings",
        b"Upgrade: h2c",
        b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
    )
    request = post(*upgrade)
    for split in (0, 60, request.index(b"\r\n\r\n") + 2, request.index(b"\r\n\r\n") + 4, len(request) - 3):
        response = exchange(service, request[:split], request[split:])
        assert (response.status, response.closed) == (200, False)
    with connect(service) as connection:
        for _ in range(2):
            connection.sendall(request)
            assert _read(connection).status == 200
    assert "Unsupported upgrade" not in service.log_text()


def test_websockets_are_unknown(service: Service) -> None:
    """A WebSocket handshake is a request for an unknown path."""
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    response = exchange(service, b"GET /ws HTTP/1.1\r\n" + HOST + upgrade + b"\r\n")
    response.assert_error(404, "unknown_url")


def test_expect_100_continue(service: Service) -> None:
    """A client that waits for 100 Continue gets it, and a body that is too large is rejected before it is sent."""
    with connect(service) as connection:
        connection.sendall(post(b"Expect: 100-continue").removesuffix(BODY))
        assert connection.recv(1024).startswith(b"HTTP/1.1 100 Continue")
        connection.sendall(BODY)
        assert _read(connection).status == 200
    too_large = b"POST /v1/embeddings HTTP/1.1\r\n" + HOST + b"Expect: 100-continue\r\nContent-Length: 99999999\r\n\r\n"
    response = exchange(service, too_large)
    response.assert_error(413, "request_too_large")
    assert response.closed


def test_connection_is_usable_after_errors(service: Service) -> None:
    """After an error the next request is answered, even if the body of the first was not read."""
    with connect(service) as connection:
        for request, status in (
            (post(body=b"{"), 400), (post(b"Content-Encoding: br"), 415), (post(b"Host: x").replace(HOST, b"", 1), 400),
            (post().replace(b"/v1/embeddings", b"/v1/embedding"), 404), (post(), 200),
        ):  # fmt: skip
            connection.sendall(request)
            assert _read(connection).status == status


def test_pipelined_requests(service: Service) -> None:
    """Requests that are sent ahead are answered in order."""
    with connect(service) as connection:
        connection.sendall(post() + b"GET /health HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")
        raw = b""
        while chunk := connection.recv(65536):
            raw += chunk
    assert [int(status) for status in re.findall(rb"HTTP/1.1 (\d+)", raw)] == [200, 200]
    assert raw.endswith(b'{"status":"ok"}')


async def test_last_piece_is_sent_although_the_service_shuts_down() -> None:
    """A shutdown between the end of a response and its last write closes the connection after that write."""
    state = ServerState()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b""})
        for connection in list(state.connections):
            connection.shutdown()

    config = uvicorn.Config(app, http=HttpProtocol, log_config=None, lifespan="off")
    config.load()
    app_state = {CONNECTIONS: ConnectionLimiter(LimitSettings())}
    server = await asyncio.get_running_loop().create_server(
        lambda: HttpProtocol(config=config, server_state=state, app_state=app_state), "127.0.0.1", 0
    )
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = await reader.read()
        writer.close()
        await writer.wait_closed()
    assert received.endswith(b"\r\n\r\n3\r\none\r\n0\r\n\r\n")


# --- invalid requests ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_bytes",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"CONNECT x:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
     b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: abc\r\n\r\n", b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
     b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n",
     b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
     b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /health HTTP/1.1\r\nHost: localhost\r\nbad header\r\n\r\n"],
    ids=lambda data: ascii(data[:20]),
)  # fmt: skip
def test_invalid_http_is_rejected_in_openais_form(service: Service, request_bytes: bytes) -> None:
    """Bytes that are not an HTTP request get an error with a request id, and the connection is closed."""
    response = exchange(service, request_bytes)
    response.assert_error(400, "invalid_http")
    assert response.closed


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/v1", 404, "unknown_url"), ("POST", "/v1/embedding", 404, "unknown_url"), ("POST", "/v1/chat/completions", 404, "unknown_url"),
     ("GET", "/redoc", 404, "unknown_url"), ("GET", "/docs/../health", 404, "unknown_url"),
     ("GET", "/docs/nothing.js", 404, "unknown_url"), ("GET", "/%zz%00%ff%0a", 404, "unknown_url"), ("GET", "/" + "x" * 5000, 404, "unknown_url"),
     ("GET", "/v1/embeddings", 405, "method_not_allowed"), ("PUT", "/v1/embeddings", 405, "method_not_allowed"),
     ("OPTIONS", "/v1/embeddings", 405, "method_not_allowed"), ("POST", "/v1/models", 405, "method_not_allowed"),
     ("DELETE", "/v1/models/x", 405, "method_not_allowed"), ("POST", "/health", 405, "method_not_allowed")],
)  # fmt: skip
def test_unknown_paths_and_methods(service: Service, method: str, path: str, status: int, code: str) -> None:
    """Unknown paths and methods are neither redirected nor answered in HTML."""
    response = exchange(service, f"{method} {path} HTTP/1.1\r\n".encode() + HOST + b"\r\n")
    response.assert_error(status, code)
    message = json.loads(response.body)["error"]["message"]
    assert message.startswith(f"Invalid URL ({method} {path[:3]}")
    assert len(message) < 300
    assert ("allow" in response.headers) == (status == 405)
