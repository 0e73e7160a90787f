"""Compressed request bodies."""

from __future__ import annotations

import gzip
import json
import zlib
from typing import TYPE_CHECKING

import pytest

from tests.service import assert_error

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

    from tests.service import Service

BODY = json.dumps({"input": ["hello", "你好"]}).encode()


def raw_deflate(data: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(data) + stream.flush()


def post(service: Service, content: bytes | Iterator[bytes], encoding: str) -> httpx.Response:
    return service.http.post("/v1/embeddings", content=content, headers={"content-encoding": encoding})


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", gzip.compress(BODY, mtime=0)),
        ("GZIP", gzip.compress(BODY, mtime=0)),
        ("x-gzip", gzip.compress(BODY, mtime=0)),
        ("deflate", zlib.compress(BODY)),
        ("deflate", raw_deflate(BODY)),
        ("identity", BODY),
    ],
)
def test_compressed_bodies_are_accepted(service: Service, encoding: str, body: bytes) -> None:
    """The response is that to the plain body, whether the compressed one comes at once or byte by byte."""
    plain = service.post(BODY).json()["data"]
    assert post(service, body, encoding).json()["data"] == plain
    if encoding != "deflate":
        assert post(service, (body[i : i + 1] for i in range(len(body))), encoding).json()["data"] == plain


def test_large_compressed_bodies(service: Service) -> None:
    """They arrive completely, although they are decompressed in pieces."""
    texts = [f"{number} " + "word " * 400 for number in range(500)]
    body = json.dumps({"input": texts, "truncate_prompt_tokens": 3}).encode()
    assert len(body) > 1_000_000
    assert len(post(service, gzip.compress(body, mtime=0), "gzip").json()["data"]) == 500


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_the_decompressed_size_is_limited(guarded: Service, encoding: str) -> None:
    """A small body that becomes too large gets 413, and the connection and the service are usable."""
    compress = gzip.compress if encoding == "gzip" else zlib.compress
    for size in (300_000, 200_000_000):
        body = compress(b" " * size)
        assert len(body) < 250_000
        assert_error(post(guarded, body, encoding), 413, "request_too_large", phrase="250 kB")
    assert guarded.embed("hello", model="mini").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        gzip.compress(BODY, mtime=0)[:-1],
        gzip.compress(BODY, mtime=0)[:20],
        gzip.compress(BODY, mtime=0) + b"x",
        gzip.compress(BODY, mtime=0) * 2,
    ],
)
def test_damaged_bodies_are_rejected(service: Service, body: bytes) -> None:
    """Incomplete ones too, and those with anything behind the end."""
    assert_error(post(service, body, "gzip"), 400, "invalid_json", phrase="decompress")
