"""10,000 answers to thousands of requests at once, each matched to its question by its value."""

from __future__ import annotations

import asyncio
import json
import random
from typing import TYPE_CHECKING, Any

import numpy as np

from tests.fuzz.contract import Answer, check, vectors
from tests.service import BUNDLED

if TYPE_CHECKING:
    from tests.service import Service

_ANSWERS, _CONNECTIONS = 10_000, 32
_COLOURS = ("red", "blue", "green", "black", "white", "yellow", "purple", "brown", "grey", "pink",
            "golden", "silver", "dark", "bright", "orange", "scarlet", "striped", "spotted", "pale", "transparent")  # fmt: skip
_THINGS = ("house", "horse", "river", "guitar", "keyboard", "mountain", "sandwich", "airplane", "doctor", "candle", "prison", "tomato", "whale",
           "contract", "hammer", "novel", "desert", "pillow", "engine", "church", "needle", "soldier", "violin", "glacier", "wallet")  # fmt: skip
_TEXTS = [f"{colour} {thing}" for colour in _COLOURS for thing in _THINGS]
"""500 texts, each clearly unlike all others, so that an answer can only be its own."""


async def _ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fields: dict[str, Any]) -> Answer:
    """Send a request on an open connection and read its answer: a tenth of what an HTTP client takes."""
    body = json.dumps(fields).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    content = await reader.readexactly(int(headers["content-length"]))
    return Answer(int(first.split()[1]), headers, content)


async def _answers(
    service: Service, requests: list[list[int]], connections: int
) -> list[tuple[list[int], Any]]:
    """Send all requests over so many connections; return each one's texts, by number, and its vectors."""
    waiting = iter(requests)
    answered: list[tuple[list[int], Any]] = []

    async def keep_asking(connection: int) -> None:
        reader, writer = await asyncio.open_connection("localhost", service.port, limit=2**22)
        for number, chosen in enumerate(waiting):
            texts: Any = [_TEXTS[place] for place in chosen]
            encoding = "base64" if (number + connection) % 2 else "float"
            fields = {"input": texts[0] if len(texts) == 1 else texts, "encoding_format": encoding}
            answer = await _ask(reader, writer, fields)
            check(answer)
            assert answer.status == 200, answer.body
            answered.append((chosen, vectors(answer, fields, default_model=BUNDLED)))
        writer.close()
        await writer.wait_closed()

    async with asyncio.timeout(400):
        await asyncio.gather(*(keep_asking(connection) for connection in range(connections)))
    return answered


def _shuffled_requests() -> list[list[int]]:
    """Return requests of one to four texts, by number, 10,000 texts in all."""
    draw = random.Random(10_000)  # noqa: S311 - the same ones each time
    cache_locations = [place % len(_TEXTS) for place in range(_ANSWERS)]
    draw.shuffle(cache_locations)
    requests = []
    while cache_locations:
        size = draw.choice((1, 1, 2, 4))
        requests.append(cache_locations[:size])
        del cache_locations[:size]
    return requests


async def test_10_000_answers_are_those_to_their_questions(service: Service) -> None:
    """However many ask at once, in whatever mixture, everybody gets the vectors of the very texts that they sent."""
    # One at a time: nothing shares a batch.
    references = np.concatenate(
        [rows for _, rows in await _answers(service, [[n] for n in range(len(_TEXTS))], 1)]
    )
    np.testing.assert_array_less((references @ references.T) - 2 * np.eye(len(_TEXTS)), 0.98)

    answered = await _answers(service, _shuffled_requests(), _CONNECTIONS)

    asked = np.concatenate([chosen for chosen, _ in answered])
    given = np.concatenate([rows for _, rows in answered])
    assert len(asked) == len(given) == _ANSWERS
    similarities = given @ references.T
    np.testing.assert_array_equal(similarities.argmax(axis=1), asked)
    np.testing.assert_array_less(0.999, similarities[np.arange(_ANSWERS), asked])
