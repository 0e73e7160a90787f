"""Full queues, deadlines, models that fail or are not loaded, and requests that the shutdown cuts off."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import openai
import pytest

from tests.api.helpers import MANY_TEXTS, POISON, busy
from tests.service import Service, assert_error, wait_until

if TYPE_CHECKING:
    from pathlib import Path


def assert_retry_after(response: httpx.Response) -> None:
    assert re.fullmatch(r"[0-9]+", response.headers["retry-after"])
    assert 1 <= int(response.headers["retry-after"]) <= 120


def test_full_queue(strained: Service) -> None:
    """While the queue is full, a large request gets 429 with Retry-After, and a small one is answered."""
    with busy(strained):
        response = strained.embed(MANY_TEXTS[:3], model="mini")
        assert_error(response, 429, "queue_full", type="rate_limit_error")
        assert_retry_after(response)
        assert strained.embed("x", model="mini").status_code == 200
    assert strained.embed("x", model="mini").status_code == 200


def test_deadline(strained: Service) -> None:
    """A request that takes longer than REQUEST_TOTAL_TIMEOUT_S gets 504, and its remaining work is dropped."""
    response = strained.embed(MANY_TEXTS, model="mini")
    assert_error(response, 504, "timeout", type="server_error", phrase="5 seconds. Send fewer or shorter texts")
    assert "EMB_PROVIDER_REQUEST_TOTAL_TIMEOUT_S" in response.json()["error"]["message"]
    assert strained.figure("emb_provider_queue_tokens", model="mini") == 0
    assert strained.embed("x", model="mini").status_code == 200


def test_sdk_does_not_repeat_what_takes_too_long(strained: Service) -> None:
    """It would fail again, and take three times as long."""
    before = strained.figure("emb_provider_requests_total", model="mini", status="504")
    with (
        openai.OpenAI(
            base_url=f"{strained.url}/v1", api_key="any", http_client=httpx.Client(trust_env=False)
        ) as client,
        pytest.raises(openai.InternalServerError, match="Send fewer or shorter texts"),
    ):
        client.embeddings.create(model="mini", input=MANY_TEXTS)
    assert strained.figure("emb_provider_requests_total", model="mini", status="504") == before + 1


def test_non_finite_vector_is_never_sent(strained: Service) -> None:
    """An input that fails gets a 500 with nothing but the request id, under which the log has the reason."""
    response = strained.embed(["good", POISON], model="poisoned")
    assert_error(response, 500, "internal_error", type="server_error")
    identifier = response.headers["x-request-id"]
    message = response.json()["error"]["message"]
    assert identifier in message
    assert "finite" not in message
    lines = strained.logged(request_id=identifier, level="ERROR")
    assert any("finite" in line["message"] for line in lines)
    assert POISON not in strained.log_text()


def test_failing_input_fails_only_its_own_request(strained: Service) -> None:
    """Requests that share batches with a failing input are answered."""
    texts = [f"good {number}" if number % 3 else POISON for number in range(12)]
    with ThreadPoolExecutor(len(texts)) as threads:
        responses = list(threads.map(lambda text: strained.embed(text, model="poisoned"), texts))
    assert [response.status_code for response in responses] == [500 if text == POISON else 200 for text in texts]


def test_model_that_failed_to_load(strained: Service) -> None:
    """Requests for a model that failed to load get the reason, and other models are served."""
    response = strained.embed("x", model="broken")
    assert_error(response, 503, "model_not_ready", type="server_error", param="model", phrase="`broken`")
    assert "not-there" in response.json()["error"]["message"]
    assert_retry_after(response)
    assert strained.embed("x", model="mini").status_code == 200


def test_model_that_is_loading(strained: Service) -> None:
    """A request that cannot wait until the model is loaded gets the model's state, and can be retried."""
    response = strained.embed("x", model="stuck")
    assert_error(response, 503, "model_not_ready", type="server_error", param="model", phrase="downloading")
    assert_retry_after(response)


def test_ready_names_the_models_that_are_not(strained: Service) -> None:
    """While a preloaded model cannot answer, /ready is 503 with the state of each model and the reason."""
    response = strained.http.get("/ready")
    assert response.status_code == 503
    body = response.json()
    assert body["status"] == "not_ready"
    assert body["models"]["mini"] == {"state": "ready"}
    assert body["models"]["broken"]["state"] == "failed"
    assert "not-there" in body["models"]["broken"]["error"]
    assert strained.http.get("/health").status_code == 200


@pytest.mark.parametrize(("alias", "state"), [("mini", "ready"), ("broken", "failed")])
def test_metric_of_the_state(strained: Service, alias: str, state: str) -> None:
    """Each model is in exactly one state."""
    assert strained.figure("emb_provider_model_state", model=alias, state=state) == 1
    assert strained.figure("emb_provider_model_state", model=alias) == 1


def test_concurrent_first_requests_load_a_model_once(guarded: Service) -> None:
    """A model that is not preloaded is loaded once, however many requests wait for it."""
    assert guarded.http.get("/ready").json()["models"]["late"]["state"] == "unloaded"
    with ThreadPoolExecutor(16) as threads:
        responses = list(threads.map(lambda n: guarded.embed(f"text {n}", model="late"), range(16)))
    assert [response.status_code for response in responses] == [200] * 16

    def count_loads() -> int:
        return sum("late is ready" in line["message"] for line in guarded.log_lines())

    wait_until(count_loads)
    assert count_loads() == 1
    assert guarded.http.get("/ready").json()["models"]["late"]["state"] == "ready"


def test_request_that_the_shutdown_cuts_off(tmp_path: Path, silent_hub: str) -> None:
    """A request that is unanswered at the end of the grace period gets an error that clients retry."""
    mapping = {"stuck": {"name": "test/stuck", "source": "huggingface", "endpoint": silent_hub}}
    settings = {"PRELOAD_MODELS": "none", "SHUTDOWN_GRACE_S": "0.5", "MODEL_MAPPING": json.dumps(mapping)}
    with Service(tmp_path, **settings) as stopping, ThreadPoolExecutor(1) as threads:
        stopping.wait("/health")
        request = threads.submit(stopping.embed, "x", model="stuck")
        stopping.wait_for_state("stuck", "downloading")
        stopping.signal()
        response = request.result()
        assert_error(response, 503, "model_not_ready", type="server_error", param="model", phrase="shutting down")
        assert_retry_after(response)
        assert response.headers["connection"] == "close"
        assert stopping.ended() == 0
        lines = stopping.log_lines(logger="emb_model_provider.access")
        assert [line["status"] for line in lines] == [503]
