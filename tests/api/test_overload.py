"""Too much, too slow, gone wrong, or given up: what callers are told, and that the service goes on."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.api.models import KEYS, MUCH, POISON, occupied
from tests.service import Service, assert_error, wait_until

if TYPE_CHECKING:
    from pathlib import Path


def assert_retry_after(response: httpx.Response) -> None:
    assert re.fullmatch(r"[0-9]+", response.headers["retry-after"])
    assert 1 <= int(response.headers["retry-after"]) <= 120


def test_full_queue(strained: Service) -> None:
    """While more waits than the queue holds, a large request is turned away, and told when to come back; a small one,
    which passes what waits, is answered.
    """
    with occupied(strained):
        response = strained.embed(MUCH[:3], model="mini")
        assert_error(response, 429, "queue_full", type="rate_limit_error")
        assert_retry_after(response)
        assert strained.embed("x", model="mini").status_code == 200
    assert strained.embed("x", model="mini").status_code == 200


def test_deadline(strained: Service) -> None:
    """A request that takes longer than it may ends in 504, and what is left of it is dropped."""
    response = strained.embed(MUCH, model="mini")
    assert_error(response, 504, "timeout", type="server_error", phrase="5 seconds")
    assert strained.figure("emb_provider_queue_tokens", model="mini") == 0
    assert strained.embed("x", model="mini").status_code == 200


def test_vector_that_is_not_finite_is_never_sent(strained: Service) -> None:
    """A failing input is a 500 that gives the request id and nothing else; the log says why under that id."""
    response = strained.embed(["good", POISON], model="poisoned")
    assert_error(response, 500, "internal_error", type="server_error")
    identifier = response.headers["x-request-id"]
    message = response.json()["error"]["message"]
    assert identifier in message
    assert "finite" not in message
    assert any(
        "not finite" in line["message"] for line in strained.logged(request_id=identifier, level="ERROR")
    )
    assert POISON not in strained.log_text()


def test_failed_input_fails_only_its_own_request(strained: Service) -> None:
    """Requests that share batches with a failing one are answered."""
    with ThreadPoolExecutor(12) as pool:
        texts = [f"good {number}" if number % 3 else POISON for number in range(12)]
        responses = list(pool.map(lambda text: strained.embed(text, model="poisoned"), texts))
    statuses = [response.status_code for response in responses]
    assert statuses == [200 if number % 3 else 500 for number in range(12)]


def test_model_that_could_not_be_loaded(strained: Service) -> None:
    """One failed model leaves the others serving; who asks for it is told why it failed."""
    response = strained.embed("x", model="broken")
    assert_error(
        response,
        503,
        "model_not_ready",
        type="server_error",
        param="model",
        phrase="`broken` could not be loaded",
    )
    assert "not-there" in response.json()["error"]["message"]
    assert_retry_after(response)
    assert strained.embed("x", model="mini").status_code == 200


def test_model_that_is_still_loading(strained: Service) -> None:
    """Who cannot wait for a model to load is told its state, and may come back."""
    response = strained.embed("x", model="stuck")
    assert_error(
        response,
        503,
        "model_not_ready",
        type="server_error",
        param="model",
        phrase="`stuck` is still downloading",
    )
    assert_retry_after(response)


def test_not_ready_says_which_model_and_why(strained: Service) -> None:
    """/ready is 503 while a model that should be there is not, with the state of each and the reason."""
    response = strained.http.get("/ready")
    assert response.status_code == 503
    body = response.json()
    assert body["status"] == "not_ready"
    assert body["models"]["mini"] == {"state": "ready"}
    assert body["models"]["broken"]["state"] == "failed"
    assert "not-there" in body["models"]["broken"]["error"]
    assert strained.http.get("/health").status_code == 200


@pytest.mark.parametrize(("alias", "state"), [("mini", "ready"), ("broken", "failed")])
def test_state_of_each_model(strained: Service, alias: str, state: str) -> None:
    """Of all states that there are, a model is in one."""
    assert strained.figure("emb_provider_model_state", model=alias, state=state) == 1
    assert strained.figure("emb_provider_model_state", model=alias) == 1


def test_many_callers_of_a_lazy_model_load_it_once(guarded: Service) -> None:
    """A model that is not loaded at the start is loaded by its first callers, together, once."""
    assert guarded.http.get("/ready").json()["models"]["late"]["state"] == "unloaded"
    with ThreadPoolExecutor(16) as pool:
        responses = list(pool.map(lambda n: guarded.embed(f"text {n}", model="late"), range(16)))
    assert [response.status_code for response in responses] == [200] * 16

    def loaded() -> int:
        return sum(line["message"].startswith("model late is ready") for line in guarded.log_lines())

    wait_until(loaded)
    assert loaded() == 1
    assert guarded.http.get("/ready").json()["models"]["late"]["state"] == "ready"


async def test_client_that_goes_away_takes_its_work_along(service: Service) -> None:
    """When a connection closes, what waits for it leaves the queue; the log has it as 499, and nothing broke."""
    async with httpx.AsyncClient(base_url=service.url, trust_env=False, timeout=240) as client:
        identifier = "gone-away"
        request = asyncio.create_task(
            client.post("/v1/embeddings", json={"input": MUCH}, headers={"x-request-id": identifier})
        )
        await asyncio.to_thread(wait_until, lambda: service.figure("emb_provider_queue_inputs") > 100)
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
    await asyncio.to_thread(wait_until, lambda: service.figure("emb_provider_queue_inputs") == 0)
    assert await asyncio.to_thread(service.logged, request_id=identifier, status=499)
    assert not service.log_lines(request_id=identifier, level="ERROR")
    assert service.embed("hello").status_code == 200


def test_client_that_goes_away_before_its_body_is_whole(service: Service) -> None:
    """A connection that closes in the middle of a body is no error of ours."""
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nX-Request-Id: half-sent\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection(("localhost", service.port)) as connection:
        connection.sendall(head + b'{"input": "')
        time.sleep(0.2)
    assert [line["status"] for line in service.logged(request_id="half-sent")] == [499]
    assert service.embed("hello").status_code == 200


def test_bodies_over_the_limit(guarded: Service) -> None:
    """413 for an announced length, and for a body that turns out too long; the connection stays in order."""
    body = json.dumps({"input": "x" * 300_000}).encode()
    assert_error(guarded.post(body), 413, "request_too_large", phrase="0.25 MiB")

    def pieces() -> object:
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    response = guarded.http.post("/v1/embeddings", content=pieces())  # type: ignore[arg-type]
    assert response.request.headers["transfer-encoding"] == "chunked"
    assert_error(response, 413, "request_too_large", phrase="0.25 MiB")
    assert guarded.embed("hello").status_code == 200
    wrong_key = httpx.post(f"{guarded.url}/v1/embeddings", content=body, headers={"authorization": f"Bearer {KEYS[0]}x"}, trust_env=False)  # fmt: skip
    assert_error(wrong_key, 401, "invalid_api_key")


def test_request_that_is_cut_off_at_the_end_is_told_so(tmp_path: Path) -> None:
    """What is unanswered when the grace period ends gets an error that clients try again, not a dropped connection."""
    with socket.create_server(("127.0.0.1", 0)) as silent_hub, ThreadPoolExecutor(1) as pool:
        endpoint = f"http://127.0.0.1:{silent_hub.getsockname()[1]}"
        mapping = {"stuck": {"name": "test/stuck", "source": "huggingface", "endpoint": endpoint}}
        settings = {"PRELOAD_MODELS": "none", "SHUTDOWN_GRACE_S": "0.5", "MODEL_MAPPING": json.dumps(mapping)}
        with Service(tmp_path, **settings) as stopping:
            stopping.wait("/health")
            asked = pool.submit(stopping.embed, "x", model="stuck")
            stopping.wait_for_state("stuck", "downloading")
            stopping.signal()
            response = asked.result()
            assert_error(
                response, 503, "model_not_ready", type="server_error", param="model", phrase="stopping"
            )
            assert_retry_after(response)
            assert response.headers["connection"] == "close"
            assert stopping.ended() == 0
            assert [line["status"] for line in stopping.log_lines(logger="emb_model_provider.access")] == [
                503
            ]
