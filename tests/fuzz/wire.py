"""Strategies for bytes that are HTTP, nearly HTTP or something else, and a parser of responses."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from tests.fuzz.contract import Response

if TYPE_CHECKING:
    import socket

_BODY = b'{"input": "hello", "encoding_format": "base64"}'
_HOST = b"Host: localhost"

_METHODS = (
    b"GET",
    b"POST",
    b"PUT",
    b"DELETE",
    b"OPTIONS",
    b"PATCH",
    b"TRACE",
    b"CONNECT",
    b"PRI",
    b"get",
    b"FOO",
    b"",
    b"G\0T",
    b"\xff",
    b"GET" * 2000,
)
_TARGETS = (
    b"/health", b"/v1/embeddings", b"/v1/models", b"/v1/models/nope", b"/v1/models/..%2f..%2fetc%2fpasswd", b"/v1/models/%00",
    b"/docs/../../etc/passwd", b"/%", b"/%zz", b"/\xff", b"/%ff%fe", b"/%0d%0aX-Injected:%201", b"*", b"", b"//", b"http://localhost/health",
    b"http://evil.example/health", b"localhost:80", b"/?" + b"q" * 3000, b"/" + b"a" * 70_000, b"/a b", b"\\health", b"/\0",
)  # fmt: skip
_VERSIONS = (
    b"HTTP/1.1",
    b"HTTP/1.0",
    b"HTTP/2.0",
    b"HTTP/0.9",
    b"HTTP/1.7",
    b"HTTP/11.1",
    b"http/1.1",
    b"HTTP/1.",
    b"",
    b"HTTP/1.1 x",
)
_HEADER_LINES = (
    b"Content-Length: 5", b"Content-Length: 0", b"Content-Length: -1", b"Content-Length: +5", b"Content-Length: 5, 5", b"Content-Length: 0x5",
    b"Content-Length: 99999999999999999999", b"Content-Length: 999999999", b"Content-Length:", b"Content-Length: 5 5", b"Content-Length: \xb2",
    b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip", b"Transfer-Encoding: chunked, identity", b"Transfer-Encoding: xchunked",
    b"Transfer-Encoding: chunked\r\nContent-Length: 3", b"Transfer-Encoding : chunked", b"Expect: 100-continue", b"Expect: 200-no",
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: eA==\r\nSec-WebSocket-Version: 13", b"Upgrade: h2c\r\nConnection: Upgrade",
    b"Connection: close", b"Connection: keep-alive", b"Connection: \xff", b"Host: localhost", b"Host: evil.example", b"Host:", b"Host: [::1",
    b"Content-Encoding: gzip", b"X-Request-Id: a\tb", b"X-Request-Id: " + b"i" * 500, b"X: " + b"v" * 70_000, b"X" * 3000 + b": v", b": v", b"X",
    b" folded: x", b"X: a\r\n b", b"X: a\rb", b"X: a\nb", b"X: \0", b"X: \x7f", b"X\0: y", "X: 中".encode(), b"X: y\r\n" * 300, b"Authorization: \xff\xfe",
    b"Origin: https://evil.example\r\nAccess-Control-Request-Method: POST",
)  # fmt: skip
_ENDS = (b"\r\n", b"\n", b"\r", b"\r\r\n")
_BODIES = (
    b"", _BODY, b"hello", b"5\r\nhello\r\n0\r\n\r\n", b"5\r\nhel", b"zz\r\n", b"-1\r\n\r\n", b"5;ext=\"\r\n\"\r\nhello\r\n0\r\n\r\n", b"5\r\nhelloo\r\n0\r\n\r\n",
    b"ffffffffffffffffff\r\n", b"0\r\nTrailer: x\r\n\r\n", b"0\r\n: \r\n\r\n", b"0" * 5000 + b"\r\n\r\n", b"\0" * 50, b"\r\n" * 50,
)  # fmt: skip


@st.composite
def raw_requests(draw: st.DrawFn, key: bytes) -> bytes:
    """Draw bytes that resemble a request, half of them with a valid key."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(min_size=1, max_size=300))
    end = draw(st.sampled_from(_ENDS)) if draw(st.integers(0, 4)) == 0 else _ENDS[0]
    start = (
        draw(_mostly(b"POST", _METHODS)),
        draw(_mostly(b"/v1/embeddings", _TARGETS)),
        draw(_mostly(b"HTTP/1.1", _VERSIONS)),
    )
    headers = draw(st.lists(st.sampled_from(_HEADER_LINES), max_size=3))
    if draw(st.booleans()):
        headers.append(_HOST)
    if draw(st.booleans()):
        headers.append(b"Authorization: Bearer " + key)
    body = draw(st.sampled_from(_BODIES))
    if draw(st.booleans()):
        headers.append(b"Content-Length: %d" % len(body))
    return end.join([b" ".join(start), *headers, b"", b""]) + body


def _mostly(usual: bytes, others: tuple[bytes, ...]) -> st.SearchStrategy[bytes]:
    return st.just(usual) | st.sampled_from(others)


@dataclass(frozen=True, slots=True)
class PipelinedRequest:
    """A valid request, one of several on a connection."""

    method: bytes
    target: bytes
    body: bytes
    identifier: str

    def raw(self, key: bytes) -> bytes:
        lines = [
            self.method + b" " + self.target + b" HTTP/1.1", _HOST, b"Authorization: Bearer " + key,
            b"X-Request-Id: " + self.identifier.encode(), b"Content-Length: %d" % len(self.body), b"", b"",
        ]  # fmt: skip
        return b"\r\n".join(lines) + self.body


_VALID_REQUESTS = st.sampled_from(
    [
        (b"GET", b"/health", b""), (b"GET", b"/v1/models", b""), (b"GET", b"/nope", b""), (b"DELETE", b"/v1/models", b""),
        (b"HEAD", b"/health", b""), (b"POST", b"/v1/embeddings", _BODY), (b"POST", b"/v1/embeddings", b"{"),
        (b"POST", b"/v1/embeddings", b'{"input": ["a", "b"]}'), (b"POST", b"/v1/embeddings", b" " * 300_000),
    ]
)  # fmt: skip
pipelines = st.lists(_VALID_REQUESTS, min_size=2, max_size=6).map(
    lambda drawn: [PipelinedRequest(*parts, identifier=f"pipelined-{index}") for index, parts in enumerate(drawn)]
)
"""Requests that are all sent before any is answered."""


def read_all(connection: socket.socket) -> bytes:
    """Read until the server closes the connection, or sends nothing for the timeout of the socket."""
    received = b""
    with contextlib.suppress(TimeoutError, ConnectionResetError):
        while chunk := connection.recv(262_144):
            received += chunk
    return received


def parse_responses(received: bytes, methods: tuple[bytes, ...] = ()) -> list[Response]:
    """Split received bytes into responses. All must be complete.

    Args:
        received: The bytes.
        methods: Methods of the first requests, because responses to HEAD have no body.
    """
    responses: list[Response] = []
    while received:
        head, end, received = received.partition(b"\r\n\r\n")
        assert end, head
        first, *lines = head.decode("latin-1").split("\r\n")
        version, status, _ = first.split(" ", 2)
        assert version == "HTTP/1.1"
        if status == "100":
            continue
        headers: dict[str, str] = {}
        for name, _, value in (line.partition(": ") for line in lines):
            assert name.lower() not in headers or name.lower() == "vary", f"{name} twice"
            headers[name.lower()] = value
        length = int(headers["content-length"])
        if len(responses) < len(methods) and methods[len(responses)] == b"HEAD":
            length = 0
        assert len(received) >= length
        responses.append(Response(int(status), headers, received[:length]))
        received = received[length:]
    return responses
