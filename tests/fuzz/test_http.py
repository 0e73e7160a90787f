"""Invalid HTTP is rejected in OpenAI's form or the connection is closed, and the service continues."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given

from tests.fuzz.contract import check
from tests.fuzz.fuzzing import KEY, fuzz_test
from tests.fuzz.wire import PipelinedRequest, parse_responses, pipelines, raw_requests, read_all

if TYPE_CHECKING:
    from tests.fuzz.fuzzing import Fuzz

_KEY = KEY.encode()
_LAST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
"""Sent after each generated request, so that the server closes the connection."""
_TIMEOUT_S = 0.3
"""How long to read from a server that waits for the rest of a body. No test depends on it."""


@fuzz_test
def test_arbitrary_bytes(fuzz: Fuzz, scale: int) -> None:
    """Whatever is sent, each response conforms to the contract, or the connection is closed without one."""

    @fuzz.settings(0.25 * scale)
    @given(raw_requests(_KEY))
    def answered_or_closed(request: bytes) -> None:
        _send(fuzz, request)

    answered_or_closed()
    fuzz.assert_alive()


def _send(fuzz: Fuzz, request: bytes) -> None:
    with fuzz.connect() as connection:
        connection.settimeout(_TIMEOUT_S)
        # The server may close the connection before it has read everything.
        with contextlib.suppress(ConnectionError, TimeoutError):
            connection.sendall(request + _LAST)
        received = read_all(connection)
    responses = parse_responses(received)
    for response in responses:
        fuzz.count("raw bytes", response)
        check(response, path="/docs/" if response.status < 400 else "")
    if not responses:
        fuzz.count("raw bytes", None)


@pytest.mark.parametrize(
    "data", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\r\n\r\n", b"\0", b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 30_000]
)  # fmt: skip
def test_other_protocols(fuzz: Fuzz, data: bytes) -> None:
    """TLS, HTTP/2 and endless headers do not stop the service."""
    _send(fuzz, data)
    fuzz.assert_alive()


@fuzz_test
def test_pipelined_requests_are_answered_in_order(fuzz: Fuzz, scale: int) -> None:
    """Each of several requests on a connection gets its own response, whatever the previous one was."""

    @fuzz.settings(0.05 * scale)
    @given(pipelines)
    def check_pipeline(requests: list[PipelinedRequest]) -> None:
        with fuzz.connect() as connection:
            connection.sendall(b"".join(request.raw(_KEY) for request in requests) + _LAST)
            received = read_all(connection)
        responses = parse_responses(received, tuple(request.method for request in requests))
        for request, response in zip(requests, responses, strict=False):
            fuzz.count("pipelined", response)
            check(response, path=request.target.decode(), has_body=request.method != b"HEAD")
            assert response.headers["x-request-id"] == request.identifier
        # A body that was rejected unread closes the connection; otherwise all requests are answered.
        closed_early = any(response.headers.get("connection") == "close" for response in responses[:-1])
        assert closed_early or len(responses) == len(requests) + 1

    check_pipeline()
    fuzz.assert_alive()
