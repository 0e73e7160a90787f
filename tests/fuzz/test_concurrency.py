"""Thousands of concurrent requests: each response has the vectors of its own texts."""

from __future__ import annotations

import asyncio
import json
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.fuzz.contract import Response, check, vectors
from tests.service import BUNDLED

if TYPE_CHECKING:
    from tests.service import Service

_CONNECTIONS = 32
_TIMEOUT_S = 400
_COLORS = ("red", "blue", "green", "black", "white", "yellow", "purple", "brown", "grey", "pink",
           "golden", "silver", "dark", "bright", "orange", "scarlet", "striped", "spotted", "pale", "transparent")  # fmt: skip
_THINGS = ("house", "horse", "river", "guitar", "keyboard", "mountain", "sandwich", "airplane", "doctor", "candle", "prison", "tomato", "whale",
           "contract", "hammer", "novel", "desert", "pillow", "engine", "church", "needle", "soldier", "violin", "glacier", "wallet")  # fmt: skip
_TEXTS = [f"{color} {thing}" for color in _COLORS for thing in _THINGS]
"""500 texts whose vectors differ clearly, so that a vector can be matched to its text."""


async def _send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fields: dict[str, Any]) -> Response:
    """Send a request on an open connection and return its response, ten times as fast as an HTTP client."""
    body = json.dumps(fields).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    content = await reader.readexactly(int(headers["content-length"]))
    return Response(int(first.split()[1]), headers, content)


async def _embed_all(service: Service, requests: list[list[int]], connections: int) -> list[tuple[list[int], Any]]:
    """Send all requests over several connections; return the indices of each request's texts with its vectors."""
    remaining = iter(requests)
    results: list[tuple[list[int], Any]] = []

    async def run_connection(connection: int) -> None:
        reader, writer = await asyncio.open_connection("localhost", service.port, limit=2**22)
        for number, indices in enumerate(remaining):
            texts: Any = [_TEXTS[index] for index in indices]
            encoding = "base64" if (number + connection) % 2 else "float"
            fields = {"input": texts[0] if len(texts) == 1 else texts, "encoding_format": encoding}
            response = await _send(reader, writer, fields)
            check(response)
            assert response.status == 200, response.body
            results.append((indices, vectors(response, fields, default_model=BUNDLED)))
        writer.close()
        await writer.wait_closed()

    async with asyncio.timeout(_TIMEOUT_S):
        await asyncio.gather(*(run_connection(connection) for connection in range(connections)))
    return results


def _shuffled_requests(inputs: int, texts: int) -> list[list[int]]:
    """Return requests with one to four texts each, as indices of the first `texts` texts."""
    draw = random.Random(10_000)  # noqa: S311 - the same requests each time
    indices = [number % texts for number in range(inputs)]
    draw.shuffle(indices)
    requests = []
    while indices:
        size = draw.choice((1, 1, 2, 4))
        requests.append(indices[:size])
        del indices[:size]
    return requests


@pytest.mark.parametrize(("inputs", "texts"), [(1_000, 100), pytest.param(10_000, len(_TEXTS), marks=pytest.mark.slow)])
async def test_each_response_has_the_vectors_of_its_texts(service: Service, inputs: int, texts: int) -> None:
    """However many requests share batches, each response has the vectors of its own texts, in order."""
    # One request at a time, so that no batch is shared.
    singles = await _embed_all(service, [[index] for index in range(texts)], connections=1)
    references = np.concatenate([rows for _, rows in singles])
    np.testing.assert_array_less((references @ references.T) - 2 * np.eye(texts), 0.98)

    results = await _embed_all(service, _shuffled_requests(inputs, texts), _CONNECTIONS)

    expected = np.concatenate([indices for indices, _ in results])
    returned = np.concatenate([rows for _, rows in results])
    assert len(expected) == len(returned) == inputs
    similarities = returned @ references.T
    np.testing.assert_array_equal(similarities.argmax(axis=1), expected)
    np.testing.assert_array_less(0.999, similarities[np.arange(inputs), expected])
