"""More than can be done: deadlines end work, full queues are said, and what is accepted is answered right."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.faults.harness import SHAKY
from tests.faults.planted import SLOW_S, WORDS
from tests.service import assert_error, wait_until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.faults.conftest import Start
    from tests.faults.harness import FaultyService

TIMEOUT_S = 4
BATCH_TOKENS = 512


@pytest.fixture(scope="module")
def faulty(start: Start) -> FaultyService:
    return start(
        REQUEST_TIMEOUT_S=str(TIMEOUT_S), MAX_QUEUE_TOKENS="1000", MAX_BATCH_TOKENS=str(BATCH_TOKENS)
    )


def test_deadline_ends_the_work(faulty: FaultyService) -> None:
    """A request that takes too long gets 504, and what is left of it is not run."""
    batches = 4 * TIMEOUT_S / SLOW_S * faulty.streams(SHAKY)
    text = f"{WORDS['slow']} " * (BATCH_TOKENS // 2 - 10)  # two fill a batch
    with faulty.undisturbed():
        answer = faulty.embed([text] * int(2 * batches), model=SHAKY)
    assert_error(answer, 504, "timeout", type="server_error")
    assert faulty.waiting(SHAKY) == 0
    texts = faulty.texts(1)
    assert faulty.is_right(faulty.embed(texts, model=SHAKY), texts)


def test_overload_is_said_and_what_is_accepted_is_right(faulty: FaultyService) -> None:
    """A full queue is 429 with a usable Retry-After; who comes back then is answered, and nobody is answered wrongly."""
    requests = [faulty.texts(12, "slow") for _ in range(30)]
    refusals: list[int] = []

    def ask(texts: Sequence[str]) -> bool:
        while True:
            answer = faulty.embed(list(texts), model=SHAKY)
            if answer.status_code != 429:
                return faulty.is_right(answer, texts)
            assert_error(answer, 429, "queue_full", type="rate_limit_error")
            refusals.append(int(answer.headers["retry-after"]))
            time.sleep(0.2)

    with faulty.undisturbed(), ThreadPoolExecutor(len(requests)) as pool:
        assert all(pool.map(ask, requests))
    assert refusals
    assert all(1 <= seconds <= 120 for seconds in refusals)
    wait_until(lambda: faulty.waiting(SHAKY) == 0)
