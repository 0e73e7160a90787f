"""An input at fault fails its own request, and nothing else."""

from __future__ import annotations

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.faults.harness import SHAKY, STEADY, cosines, vectors_of
from tests.service import assert_error, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

    from tests.faults.conftest import Start
    from tests.faults.harness import FaultyService
    from tests.faults.planted import Fault

LOWERED_S = 5.0
"""How long batches stay small here after there was no memory for one."""


@pytest.fixture(scope="module")
def faulty(start: Start) -> FaultyService:
    return start(patches={"emb_model_provider.serving.scheduler:_LOWERED_BUDGET_S": LOWERED_S})


@pytest.fixture(autouse=True)
def well_afterwards(faulty: FaultyService) -> Iterator[None]:
    """No fault of this module needs the model to be loaded anew, nor leaves work behind."""
    loads = len(faulty.control.events("load"))
    yield
    assert len(faulty.control.events("load")) == loads
    assert faulty.http.get("/ready").status_code == 200
    wait_until(lambda: faulty.waiting(SHAKY) == 0)


def assert_failed(response: httpx.Response) -> None:
    assert_error(response, 500, "internal_error", type="server_error")
    assert response.headers["x-request-id"] in response.json()["error"]["message"]


def test_out_of_memory_splits_and_lowers_the_budget(faulty: FaultyService) -> None:
    """A batch too large for the memory runs in parts, later ones are smaller from the start, and then large again."""
    limit, streams = 100, faulty.streams(SHAKY)
    # No half of a batch is larger than that: it is what a lane begins with before it knows.
    large = 2 * limit + 60
    requests = [faulty.texts(3) for _ in range(40 * streams)]
    faulty.control.arm("watch", SHAKY)

    def larges() -> int:
        """Ask all, and return how many large batches that made."""
        before = count()
        answers = faulty.together(requests, SHAKY)
        assert all(faulty.is_right(answer, texts) for answer, texts in zip(answers, requests, strict=True))
        return count() - before

    def count() -> int:
        return sum(event["padded"] > large for event in faulty.control.events("batch", alias=SHAKY))

    wait_until(lambda: larges() > streams)
    faulty.control.arm("memory", SHAKY, str(limit))
    assert 1 <= larges() <= streams
    faulty.control.disarm("memory", SHAKY)
    wait_until(lambda: larges() > streams)
    faulty.control.disarm("watch", SHAKY)


@pytest.mark.parametrize("fault", ["raise", "exit", "nan-always", "memory-one"])
def test_only_the_request_at_fault_fails(faulty: FaultyService, fault: Fault) -> None:
    """Of requests that share a batch with an input that cannot be computed, only its own fails, with its id."""
    good = [faulty.texts(1 + number % 3) for number in range(16)]
    bad = [faulty.texts(1, fault), [*faulty.texts(2), *faulty.texts(1, fault)]]
    with faulty.undisturbed():
        answers = faulty.together([*good[:8], *bad, *good[8:]], SHAKY)
    for response in answers[8:10]:
        assert_failed(response)
    others = answers[:8] + answers[10:]
    assert all(faulty.is_right(answer, texts) for answer, texts in zip(others, good, strict=True))
    faults = faulty.control.events("fault", kind=fault, alias=SHAKY)
    assert max(event["rows"] for event in faults) > 1, "the fault never shared a batch"


def test_vector_that_is_not_finite_is_computed_again(faulty: FaultyService) -> None:
    """NaN from the model's own precision is replaced by the fp32 vector: nobody notices."""
    texts = [*faulty.texts(2), *faulty.texts(1, "nan"), *faulty.texts(2)]
    others = [faulty.texts(1) for _ in range(8)]
    answers = faulty.together([texts, *others], SHAKY)
    assert all(faulty.is_right(*one) for one in zip(answers, [texts, *others], strict=True))
    assert faulty.control.events("fp32", alias=SHAKY)


def test_counting_that_fails_costs_nothing(faulty: FaultyService) -> None:
    """An error in the figures, outside the forward pass, reaches no request."""
    requests = [faulty.texts(2) for _ in range(8)]
    with faulty.held(SHAKY):
        faulty.control.arm("on-batch", SHAKY, "RuntimeError")
    answers = faulty.together(requests, SHAKY)
    assert faulty.control.events("fault", kind="on-batch")
    assert all(faulty.is_right(answer, texts) for answer, texts in zip(answers, requests, strict=True))


def test_client_that_goes_away_takes_its_queued_work_along(faulty: FaultyService) -> None:
    """What waits of a request whose connection closed is dropped, and never run."""
    texts = faulty.texts(100)
    with faulty.held(SHAKY):
        body = json.dumps({"model": SHAKY, "input": texts}).encode()
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("localhost", faulty.port)) as connection:
            connection.sendall(head.encode() + body)
            wait_until(lambda: faulty.waiting(SHAKY) == len(texts))
        wait_until(lambda: faulty.waiting(SHAKY) == 0)
        ran = len(faulty.control.events("batch", alias=SHAKY))
        faulty.control.arm("watch", SHAKY)
    faulty.control.disarm("watch", SHAKY)
    assert len(faulty.control.events("batch", alias=SHAKY)) == ran


def test_every_caller_gets_its_own_vectors_while_others_fail(faulty: FaultyService) -> None:
    """Under concurrency, with every kind of bad input in between, each answer is that of its question."""
    kinds: list[tuple[Fault, ...]] = [
        (),
        ("raise",),
        (),
        ("nan",),
        (),
        ("exit",),
        (),
        ("memory-one",),
        ("nan-always",),
    ]
    requests = [(faulty.texts(1 + number % 4, *kinds[number % 9]), kinds[number % 9]) for number in range(90)]

    def ask(number: int) -> httpx.Response:
        texts, faults = requests[number]
        return faulty.embed(texts, model=SHAKY if faults or number % 2 else STEADY)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(len(requests))))
    for answer, (texts, faults) in zip(answers, requests, strict=True):
        if faults in ((), ("nan",)):
            assert faulty.is_right(answer, texts)
        else:
            assert_failed(answer)


def test_other_texts_are_told_apart(faulty: FaultyService) -> None:
    """What these tests call right is not what another text would get."""
    texts = faulty.texts(20)
    vectors = vectors_of(faulty.embed(texts, model=SHAKY))
    assert faulty.is_right(faulty.embed(texts, model=SHAKY), texts)
    assert (cosines(vectors[1:], vectors[:-1]) < 0.95).all()
