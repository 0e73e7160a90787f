"""Request ids, HEAD requests, the size and encoding of bodies, and clients that disconnect."""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.api.helpers import KEYS, MANY_TEXTS, call, connect
from tests.service import assert_error, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.service import Service


@pytest.mark.parametrize(
    "identifier", ["abc", "req_0123", "a" * 128, "550e8400-e29b-41d4-a716-446655440000", "a.b:c/d+e=f_g"]
)
def test_valid_request_id_is_returned(service: Service, identifier: str) -> None:
    """The client's request id is in the response, also in errors, and in the log."""
    headers = {"x-request-id": identifier}
    for path in ("/health", "/v1/models/nope"):
        assert service.http.get(path, headers=headers).headers["x-request-id"] == identifier
    assert service.logged(request_id=identifier, status=404)


@pytest.mark.parametrize("identifier", ["", "a b", "a" * 129, "<script>", 'x"y', "{}", "ä", "a\tb", "a;b", "%0a"])
def test_invalid_request_id_is_replaced(service: Service, identifier: str) -> None:
    """A request id with characters that are dangerous in a log or a page is not used."""
    response = call(service, "GET", "/health", x_request_id=identifier)
    assert re.fullmatch(r"req_[0-9a-f]{24}", response.headers["x-request-id"])


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/v1/models", "/docs", "/openapi.json"])
def test_head_returns_the_headers_of_get(service: Service, path: str) -> None:
    """Monitoring that sends HEAD gets the headers of GET without a body."""
    response = service.http.head(path)
    assert response.status_code == 200
    assert response.content == b""
    assert int(response.headers["content-length"]) > 0
    assert service.http.head("/v1/embeddings").status_code == 405


@pytest.mark.parametrize("encoding", ["br", "zstd", "deflate, gzip"])
def test_unsupported_compression_is_rejected(service: Service, encoding: str) -> None:
    """A compressed body is not reported as invalid JSON."""
    response = service.http.post("/v1/embeddings", content=b"\x1f\x8b\x08", headers={"content-encoding": encoding})
    assert_error(response, 415, "unsupported_content_encoding", phrase="Content-Encoding")


def test_large_bodies_are_rejected(guarded: Service) -> None:
    """A body above the limit gets 413, whether its size is announced or not, and the connection is usable."""
    body = json.dumps({"input": "x" * 300_000}).encode()
    assert_error(guarded.post(body), 413, "request_too_large", phrase="250 kB")

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    response = guarded.http.post("/v1/embeddings", content=pieces())
    assert response.request.headers["transfer-encoding"] == "chunked"
    assert_error(response, 413, "request_too_large", phrase="250 kB")
    assert guarded.embed("hello").status_code == 200
    wrong_key = httpx.post(
        f"{guarded.url}/v1/embeddings", content=body, headers={"authorization": f"Bearer {KEYS[0]}x"}, trust_env=False
    )
    assert_error(wrong_key, 401, "invalid_api_key")


async def test_work_of_a_disconnected_client_is_dropped(service: Service) -> None:
    """If a client disconnects, its inputs leave the queue, and the log shows the request as 499 without an error."""
    identifier = "disconnected"
    async with httpx.AsyncClient(base_url=service.url, trust_env=False, timeout=240) as client:
        request = asyncio.create_task(
            client.post("/v1/embeddings", json={"input": MANY_TEXTS}, headers={"x-request-id": identifier})
        )
        await asyncio.to_thread(wait_until, lambda: service.figure("emb_provider_queue_inputs") > 100)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
    await asyncio.to_thread(wait_until, lambda: service.figure("emb_provider_queue_inputs") == 0)
    assert await asyncio.to_thread(service.logged, request_id=identifier, status=499)
    assert not service.log_lines(request_id=identifier, level="ERROR")
    assert service.embed("hello").status_code == 200


def test_client_disconnects_before_its_body_is_complete(service: Service) -> None:
    """A connection that is closed in the middle of a body is not an error of the service."""
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: half-sent\r\nContent-Length: 1000\r\n\r\n"
    with connect(service) as connection:
        connection.sendall(head + b'{"input": "')
        time.sleep(0.2)
    assert [line["status"] for line in service.logged(request_id="half-sent")] == [499]
    assert service.embed("hello").status_code == 200
