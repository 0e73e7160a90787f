"""Connections that carry anything but what HTTP says: refused in OpenAI's form or closed, and the service goes on."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import pytest
from hypothesis import given

from tests.fuzz.contract import check
from tests.fuzz.fuzzing import KEY
from tests.fuzz.wire import Asked, answers, pipelines, raw_requests, read_all

if TYPE_CHECKING:
    from tests.fuzz.fuzzing import Fuzz

_KEY = KEY.encode()
_LAST = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
"""Sent behind everything, so that what is complete is answered, and the connection closed."""
_PATIENCE_S = 0.3
"""A server that waits for the rest of a body says nothing; no test depends on how long it takes to answer."""


def test_what_is_not_quite_http(fuzz: Fuzz) -> None:
    """Whatever is sent, each answer is one of the contract's, or the connection ends without one."""

    @fuzz.settings(0.25)
    @given(raw_requests(_KEY))
    def answered_or_closed(request: bytes) -> None:
        _send(fuzz, request)

    answered_or_closed()
    fuzz.assert_alive()


def _send(fuzz: Fuzz, request: bytes) -> None:
    with fuzz.connect() as connection:
        connection.settimeout(_PATIENCE_S)
        # It may close the connection before it has read all.
        with contextlib.suppress(ConnectionError, TimeoutError):
            connection.sendall(request + _LAST)
        received = read_all(connection)
    found = answers(received)
    for answer in found:
        fuzz.note("raw bytes", answer)
        check(answer, path="/docs/" if answer.status < 400 else "")
    if not found:
        fuzz.note("raw bytes", None)


@pytest.mark.parametrize(
    "request_", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\r\n\r\n", b"\0", b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 30_000]
)  # fmt: skip
def test_other_protocols(fuzz: Fuzz, request_: bytes) -> None:
    """TLS, HTTP/2 and endless headers on this port do no harm."""
    _send(fuzz, request_)
    fuzz.assert_alive()


def test_requests_behind_each_other_are_answered_in_order(fuzz: Fuzz) -> None:
    """Each of several requests on a connection gets its own answer, whatever the one before it was."""

    @fuzz.settings(0.05)
    @given(pipelines)
    def in_order(asked: list[Asked]) -> None:
        with fuzz.connect() as connection:
            connection.sendall(b"".join(one.raw(_KEY) for one in asked) + _LAST)
            found = answers(read_all(connection), tuple(one.method for one in asked))
        for one, answer in zip(asked, found, strict=False):
            fuzz.note("pipelined", answer)
            check(answer, path=one.target.decode(), has_body=one.method != b"HEAD")
            assert answer.headers["x-request-id"] == one.identifier
        # A body that was refused unread ends the connection; else all are answered, the last one too.
        closed_early = any(answer.headers.get("connection") == "close" for answer in found[:-1])
        assert closed_early or len(found) == len(asked) + 1

    in_order()
    fuzz.assert_alive()
