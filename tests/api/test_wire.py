"""HTTP as it comes over the wire, sane or not: every answer has OpenAI's form and a request id."""

from __future__ import annotations

import json
import re
import socket
from typing import TYPE_CHECKING

import pytest

from tests.service import assert_error

if TYPE_CHECKING:
    from tests.service import Service

BODY = b'{"input": "hello", "encoding_format": "base64"}'
HOST = b"Host: localhost\r\n"


class Answer:
    """A response as it came; `closed` tells whether the server then closed the connection."""

    def __init__(self, raw: bytes) -> None:
        head, _, self.body = raw.partition(b"\r\n\r\n")
        lines = head.decode("latin-1").split("\r\n")
        self.status = int(lines[0].split()[1]) if raw else 0
        self.headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])
        }
        self.closed = not raw

    def assert_error(self, status: int, code: str) -> None:
        assert self.status == status
        assert self.headers["x-request-id"]
        assert self.headers["content-type"] == "application/json"
        error = json.loads(self.body)["error"]
        assert (error["code"], error["type"]) == (code, "invalid_request_error")
        assert set(error) == {"message", "type", "param", "code"}


def exchange(service: Service, *pieces: bytes) -> Answer:
    """Send bytes, piece by piece, and read one response (and any 100 Continue before it)."""
    with connect(service) as connection:
        for piece in pieces:
            connection.sendall(piece)
        answer = _read(connection)
        answer.closed = _is_closed(connection)
        return answer


def connect(service: Service) -> socket.socket:
    return socket.create_connection(("localhost", service.port), timeout=120)


def _is_closed(connection: socket.socket) -> bool:
    """Tell whether the server closed a connection, by asking for something more."""
    try:
        connection.sendall(b"GET /health HTTP/1.1\r\n" + HOST + b"\r\n")
        return _read(connection).closed
    except ConnectionError:
        return True


def _read(connection: socket.socket) -> Answer:
    raw = b""
    while True:
        chunk = connection.recv(65536)
        raw = (raw + chunk).removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", raw, re.IGNORECASE)
        _, end, body = raw.partition(b"\r\n\r\n")
        if not chunk or (end and length is not None and len(body) >= int(length.group(1))):
            return Answer(raw)


def post(*headers: bytes, version: bytes = b"1.1", body: bytes = BODY) -> bytes:
    lines = b"".join(header + b"\r\n" for header in headers)
    return (
        b"POST /v1/embeddings HTTP/"
        + version
        + b"\r\n"
        + HOST
        + lines
        + b"Content-Length: %d\r\n\r\n" % len(body)
        + body
    )


@pytest.mark.parametrize("split", [1, 30, 150, len(post()) - 1])
def test_request_in_pieces(service: Service, split: int) -> None:
    """Wherever the network cuts a request, it is the same request."""
    answer = exchange(service, post()[:split], post()[split:])
    assert (answer.status, answer.closed) == (200, False)


def test_chunked_body(service: Service) -> None:
    """A body without an announced length is read to its end."""
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (BODY[:5], BODY[5:])) + b"0\r\n\r\n"
    answer = exchange(
        service, b"POST /v1/embeddings HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks
    )
    assert answer.status == 200


def test_http_1_0_without_a_host(service: Service) -> None:
    """Plain health checks and old clients are answered, and their connection is closed."""
    answer = exchange(service, b"GET /health HTTP/1.0\r\n\r\n")
    assert (answer.status, answer.closed) == (200, True)
    assert exchange(service, post(version=b"1.0")).status == 200


def test_java_clients_that_would_rather_speak_http_2(service: Service) -> None:
    """Java's HttpClient (Spring AI) asks for HTTP/2 with each request: it is answered in HTTP/1.1, body and all."""
    wish = (
        b"Connection: Upgrade, HTTP2-Settings",
        b"Upgrade: h2c",
        b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA",
    )
    request = post(*wish)
    for split in (0, 60, request.index(b"\r\n\r\n") + 2, request.index(b"\r\n\r\n") + 4, len(request) - 3):
        answer = exchange(service, request[:split], request[split:])
        assert (answer.status, answer.closed) == (200, False)
    with connect(service) as connection:
        for _ in range(2):
            connection.sendall(request)
            assert _read(connection).status == 200
    assert "Unsupported upgrade" not in service.log_text()


def test_websockets_are_unknown(service: Service) -> None:
    """A WebSocket handshake is a request for a page that is not there."""
    wish = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
    exchange(service, b"GET /ws HTTP/1.1\r\n" + HOST + wish + b"\r\n").assert_error(404, "unknown_url")


def test_expect_100_continue(service: Service) -> None:
    """A client that waits to be told to send its body is told; one that would send too much is refused unheard."""
    with connect(service) as connection:
        connection.sendall(post(b"Expect: 100-continue").removesuffix(BODY))
        assert connection.recv(1024).startswith(b"HTTP/1.1 100 Continue")
        connection.sendall(BODY)
        assert _read(connection).status == 200
    too_large = (
        b"POST /v1/embeddings HTTP/1.1\r\n"
        + HOST
        + b"Expect: 100-continue\r\nContent-Length: 99999999\r\n\r\n"
    )
    answer = exchange(service, too_large)
    answer.assert_error(413, "request_too_large")
    assert answer.closed


def test_connection_goes_on_after_errors(service: Service) -> None:
    """Errors, also those told before the body was read, leave a connection usable."""
    with connect(service) as connection:
        for request, status in (
            (post(body=b"{"), 400), (post(b"Content-Encoding: gzip"), 415), (post(b"Host: x").replace(HOST, b"", 1), 400),
            (post().replace(b"/v1/embeddings", b"/v1/embedding"), 404), (post(), 200),
        ):  # fmt: skip
            connection.sendall(request)
            assert _read(connection).status == status


def test_pipelined_requests(service: Service) -> None:
    """Requests sent without waiting are answered in order."""
    with connect(service) as connection:
        connection.sendall(post() + b"GET /health HTTP/1.1\r\n" + HOST + b"Connection: close\r\n\r\n")
        raw = b""
        while chunk := connection.recv(65536):
            raw += chunk
    assert [int(status) for status in re.findall(rb"HTTP/1.1 (\d+)", raw)] == [200, 200]
    assert raw.endswith(b'{"status":"ok"}')


@pytest.mark.parametrize(
    "request_bytes",
    [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"nonsense\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"CONNECT x:443 HTTP/1.1\r\nHost: localhost\r\n\r\n",
     b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: abc\r\n\r\n", b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
     b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: " + b"9" * 30 + b"\r\n\r\n",
     b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
     b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", b"GET /health HTTP/1.1\r\nHost: localhost\r\nbad header\r\n\r\n"],
    ids=lambda data: ascii(data[:20]),
)  # fmt: skip
def test_what_is_not_http_is_refused_in_our_form(service: Service, request_bytes: bytes) -> None:
    """Bytes that are no request get an error that can be read, with an id, and the connection ends."""
    answer = exchange(service, request_bytes)
    answer.assert_error(400, "invalid_http")
    assert answer.closed


@pytest.mark.parametrize("encoding", ["gzip", "br", "GZIP", "deflate, gzip"])
def test_compressed_bodies_are_refused(service: Service, encoding: str) -> None:
    """A compressed body is not mistaken for bad JSON."""
    response = service.http.post(
        "/v1/embeddings", content=b"\x1f\x8b\x08", headers={"content-encoding": encoding}
    )
    assert_error(response, 415, "unsupported_content_encoding", phrase="Content-Encoding")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/", 404, "unknown_url"), ("GET", "/v1", 404, "unknown_url"), ("POST", "/v1/embedding", 404, "unknown_url"),
     ("POST", "/embeddings", 404, "unknown_url"), ("POST", "/v1/embeddings/", 404, "unknown_url"), ("GET", "/v1/models/", 404, "unknown_url"),
     ("POST", "//v1/embeddings", 404, "unknown_url"), ("GET", "/redoc", 404, "unknown_url"), ("GET", "/docs/../health", 404, "unknown_url"),
     ("GET", "/docs/nothing.js", 404, "unknown_url"), ("GET", "/%zz%00%ff%0a", 404, "unknown_url"), ("GET", "/" + "x" * 5000, 404, "unknown_url"),
     ("GET", "/v1/embeddings", 405, "method_not_allowed"), ("PUT", "/v1/embeddings", 405, "method_not_allowed"),
     ("OPTIONS", "/v1/embeddings", 405, "method_not_allowed"), ("POST", "/v1/models", 405, "method_not_allowed"),
     ("DELETE", "/v1/models/x", 405, "method_not_allowed"), ("POST", "/health", 405, "method_not_allowed")],
)  # fmt: skip
def test_unknown_routes_and_methods(service: Service, method: str, path: str, status: int, code: str) -> None:
    """Nothing is redirected, and nothing is answered in HTML."""
    raw = f"{method} {path} HTTP/1.1\r\n".encode() + HOST + b"\r\n"
    answer = exchange(service, raw)
    answer.assert_error(status, code)
    message = json.loads(answer.body)["error"]["message"]
    assert message.startswith(f"Invalid URL ({method} {path[:3]}")
    assert len(message) < 300
    assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/docs", "/openapi.json"])
def test_head_is_get_without_the_body(service: Service, path: str) -> None:
    """Watchers that send HEAD get GET's headers."""
    response = service.http.head(path)
    assert response.status_code == 200
    assert response.content == b""
    assert int(response.headers["content-length"]) > 0
    assert service.http.head("/v1/embeddings").status_code == 405


@pytest.mark.parametrize(
    "given", ["abc", "req_0123", "a" * 128, "550e8400-e29b-41d4-a716-446655440000", "a.b:c/d+e=f_g"]
)
def test_sane_request_id_is_echoed(service: Service, given: str) -> None:
    """A caller's own id comes back, with answers and with errors, and is the log's."""
    for path in ("/health", "/v1/models/nope"):
        assert service.http.get(path, headers={"x-request-id": given}).headers["x-request-id"] == given
    assert service.logged(request_id=given, status=404)


@pytest.mark.parametrize("given", ["", "a b", "a" * 129, "<script>", 'x"y', "{}", "ä", "a\tb", "a;b", "%0a"])
def test_other_request_ids_are_replaced(service: Service, given: str) -> None:
    """What could do harm in a log or a page is not repeated."""
    header = (b"X-Request-Id", given.encode("latin-1"))
    response = service.http.get("/health", headers=[header])
    assert re.fullmatch(r"req_[0-9a-f]{24}", response.headers["x-request-id"])
