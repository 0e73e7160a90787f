"""Overload: deadlines, full queues, and correct responses to accepted requests."""

from __future__ import annotations

import asyncio
import itertools
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest
from tokenizers import Tokenizer

from emb_model_provider.hubs.local import find_bundled
from tests.faults.harness import SHAKY, vectors_of
from tests.faults.planted import SLOW_S, WORDS, stand_in_vectors
from tests.service import assert_error, wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.faults.conftest import Start
    from tests.faults.harness import FaultyService

TIMEOUT_S = 4
BATCH_TOKENS = 512
TOKENS, LARGE = 300_000, 1200
"""Tokens and inputs of a large request: MAX_REQUEST_TOKENS."""
TOKENIZER = Tokenizer.from_file(str(find_bundled() / "tokenizer.json"))
TOKENIZER.no_truncation()
TOKENIZER.no_padding()


@pytest.fixture(scope="module")
def faulty(start: Start) -> FaultyService:
    return start(REQUEST_TOTAL_TIMEOUT_S=str(TIMEOUT_S), MAX_QUEUE_TOKENS="1000", MAX_BATCH_TOKENS=str(BATCH_TOKENS))


@pytest.mark.slow
def test_deadline_removes_the_request_from_the_queue(faulty: FaultyService) -> None:
    """A request that takes too long gets 504, and its waiting inputs do not run."""
    batches = 4 * TIMEOUT_S / SLOW_S * faulty.streams(SHAKY)
    words = f"{WORDS['slow']} " * (BATCH_TOKENS // 2 - 10)  # two fill a batch
    with faulty.undisturbed():
        response = faulty.embed([f"{number} {words}" for number in range(int(2 * batches))], model=SHAKY)
    assert_error(response, 504, "timeout", type="server_error")
    assert faulty.waiting(SHAKY) == 0
    texts = faulty.texts(1)
    assert faulty.is_correct(faulty.embed(texts, model=SHAKY), texts)


@pytest.mark.slow
def test_bulk_requests_wait_for_their_turn(start: Start) -> None:
    """2,000 at once, and one of 300,000 tokens, on a model that needs many times REQUEST_TIMEOUT_S for them.

    The single texts overtake the large request, and each input gets its own vector.
    """
    service = start(REQUEST_TIMEOUT_S="4", MAX_BATCH_TOKENS=str(BATCH_TOKENS))
    words = sorted(word for word in TOKENIZER.get_vocab() if word.isascii() and word.isalpha())
    large = [f"{word} " + "word " * (TOKENS // LARGE - 3) for word in words[:LARGE]]
    singles = words[-2000:]
    answered: list[str] = []

    async def send(client: httpx.AsyncClient, name: str, texts: list[str]) -> None:
        response = await client.post("/v1/embeddings", json={"model": SHAKY, "input": texts})
        assert response.status_code == 200, response.text
        answered.append(name)
        ids = [encoding.ids for encoding in TOKENIZER.encode_batch(texts)]
        assert response.json()["usage"]["prompt_tokens"] == sum(map(len, ids))
        np.testing.assert_array_equal(vectors_of(response), stand_in_vectors(ids, 384))

    async def send_all() -> None:
        async with AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
            # Many clients, because the time that httpx needs for a response grows with the connections of a client:
            # with 2,000 it is so far behind that it reads the last responses in any order.
            limits = httpx.Limits(max_connections=None)
            clients = [
                await stack.enter_async_context(
                    httpx.AsyncClient(base_url=service.url, timeout=500, limits=limits, trust_env=False)
                )
                for _ in range(40)
            ]
            tasks.create_task(send(clients[0], "large", large))
            for client, text in zip(itertools.cycle(clients), singles, strict=False):
                tasks.create_task(send(client, "single", [text]))

    # Together the streams need five times REQUEST_TIMEOUT_S.
    service.control.arm("pace", SHAKY, str(TOKENS / 20 / service.streams(SHAKY)))
    with service.undisturbed():
        asyncio.run(send_all())
    assert answered == ["single"] * len(singles) + ["large"]


def test_full_queue_rejects_and_accepted_requests_are_answered(faulty: FaultyService) -> None:
    """A full queue responds with 429 and a valid Retry-After. Requests that are sent again are answered correctly."""
    requests = [faulty.texts(12, "slow") for _ in range(30)]
    retry_after: list[int] = []

    def send(texts: Sequence[str]) -> bool:
        while True:
            response = faulty.embed(list(texts), model=SHAKY)
            if response.status_code != 429:
                return faulty.is_correct(response, texts)
            assert_error(response, 429, "queue_full", type="rate_limit_error")
            retry_after.append(int(response.headers["retry-after"]))
            time.sleep(0.2)

    with faulty.undisturbed(), ThreadPoolExecutor(len(requests)) as pool:
        assert all(pool.map(send, requests))
    assert retry_after
    assert all(1 <= seconds <= 120 for seconds in retry_after)
    wait_until(lambda: faulty.waiting(SHAKY) == 0)
