"""Inputs that cause errors fail their own request only."""

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
"""How long batches stay small after one did not fit into memory, in seconds."""


@pytest.fixture(scope="module")
def faulty(start: Start) -> FaultyService:
    return start(timings={"lowered_budget_s": LOWERED_S})


@pytest.fixture(autouse=True)
def check_service_afterwards(faulty: FaultyService) -> Iterator[None]:
    """No fault of this module restarts a model or leaves requests in the queue."""
    loads = len(faulty.control.events("load"))
    yield
    assert len(faulty.control.events("load")) == loads
    assert faulty.http.get("/ready").status_code == 200
    wait_until(lambda: faulty.waiting(SHAKY) == 0)


def assert_failed(response: httpx.Response) -> None:
    assert_error(response, 500, "internal_error", type="server_error")
    assert response.headers["x-request-id"] in response.json()["error"]["message"]


@pytest.mark.slow
def test_batches_stay_small_after_one_did_not_fit_into_memory(faulty: FaultyService) -> None:
    """A batch that does not fit is divided. Later batches are small from the start, and large again after a while."""
    limit, streams = 100, faulty.streams(SHAKY)
    # Half of a batch is not larger, so only batches that start before the limit is lowered are counted.
    large = 2 * limit + 60
    requests = [faulty.texts(3) for _ in range(40 * streams)]
    faulty.control.arm("watch", SHAKY)

    def run_requests() -> int:
        """Return the number of large batches that the requests cause."""
        before = count()
        responses = faulty.embed_together(requests, SHAKY)
        assert all(faulty.is_correct(response, texts) for response, texts in zip(responses, requests, strict=True))
        return count() - before

    def count() -> int:
        return sum(event["padded"] > large for event in faulty.control.events("batch", alias=SHAKY))

    wait_until(lambda: run_requests() > streams)
    faulty.control.arm("memory", SHAKY, str(limit))
    assert 1 <= run_requests() <= streams
    faulty.control.disarm("memory", SHAKY)
    wait_until(lambda: run_requests() > streams)
    faulty.control.disarm("watch", SHAKY)


@pytest.mark.parametrize("fault", ["raise", "exit", "nan-always", "memory-one"])
def test_only_the_request_that_causes_an_error_fails(faulty: FaultyService, fault: Fault) -> None:
    """Of the requests that share a batch with such an input, only its own fails. The error contains the request id."""
    good = [faulty.texts(1 + number % 3) for number in range(16)]
    bad = [faulty.texts(1, fault), [*faulty.texts(2), *faulty.texts(1, fault)]]
    with faulty.undisturbed():
        responses = faulty.embed_together([*good[:8], *bad, *good[8:]], SHAKY)
    for response in responses[8:10]:
        assert_failed(response)
    others = responses[:8] + responses[10:]
    assert all(faulty.is_correct(response, texts) for response, texts in zip(others, good, strict=True))
    faults = faulty.control.events("fault", kind=fault, alias=SHAKY)
    assert max(event["rows"] for event in faults) > 1, "the fault never shared a batch"


def test_vector_that_is_not_finite_is_computed_again(faulty: FaultyService) -> None:
    """NaN at the precision of the model is replaced by the vector at fp32, and no request fails."""
    texts = [*faulty.texts(2), *faulty.texts(1, "nan"), *faulty.texts(2)]
    others = [faulty.texts(1) for _ in range(8)]
    responses = faulty.embed_together([texts, *others], SHAKY)
    assert all(faulty.is_correct(*pair) for pair in zip(responses, [texts, *others], strict=True))
    assert faulty.control.events("fp32", alias=SHAKY)


def test_error_while_recording_metrics_fails_no_request(faulty: FaultyService) -> None:
    """An error outside of the forward pass does not affect a request."""
    requests = [faulty.texts(2) for _ in range(8)]
    with faulty.held(SHAKY):
        faulty.control.arm("on-batch", SHAKY, "RuntimeError")
    responses = faulty.embed_together(requests, SHAKY)
    assert faulty.control.events("fault", kind="on-batch")
    assert all(faulty.is_correct(response, texts) for response, texts in zip(responses, requests, strict=True))


def test_disconnected_client_leaves_the_queue(faulty: FaultyService) -> None:
    """The waiting inputs of a request whose connection is closed do not run."""
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


def test_concurrent_requests_get_their_own_vectors_while_others_fail(faulty: FaultyService) -> None:
    """Each response of concurrent requests, some of which fail in all possible ways, has the vectors of its request."""
    kinds: list[tuple[Fault, ...]] = [(), ("raise",), (), ("nan",), (), ("exit",), (), ("memory-one",), ("nan-always",)]
    requests = [(faulty.texts(1 + number % 4, *kinds[number % 9]), kinds[number % 9]) for number in range(90)]

    def send(number: int) -> httpx.Response:
        texts, faults = requests[number]
        return faulty.embed(texts, model=SHAKY if faults or number % 2 else STEADY)

    with ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(send, range(len(requests))))
    for response, (texts, faults) in zip(responses, requests, strict=True):
        if faults in ((), ("nan",)):
            assert faulty.is_correct(response, texts)
        else:
            assert_failed(response)


def test_vectors_of_other_texts_are_not_accepted(faulty: FaultyService) -> None:
    """The check of these tests does not accept the vectors of other texts."""
    texts = faulty.texts(20)
    vectors = vectors_of(faulty.embed(texts, model=SHAKY))
    assert faulty.is_correct(faulty.embed(texts, model=SHAKY), texts)
    assert (cosines(vectors[1:], vectors[:-1]) < 0.95).all()
