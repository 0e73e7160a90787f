"""Models that crash: they are restarted, or fail if they crash repeatedly. Other models are not affected."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.faults.harness import SHAKY, STEADY
from tests.service import assert_error, wait_until

if TYPE_CHECKING:
    from tests.faults.conftest import Start
    from tests.faults.harness import FaultyService

TIMINGS = {"restart_pauses_s": [0.0, 0.0, 0.0], "retry_after_failure_s": 1.0}
"""Shorter than by default, so that tests need not wait."""


@pytest.fixture(scope="module")
def faulty(start: Start) -> FaultyService:
    return start(timings=TIMINGS)


def loads(service: FaultyService, alias: str) -> int:
    return len(service.control.events("load", alias=alias))


@pytest.mark.slow
def test_crash_of_a_stream_loses_no_request(faulty: FaultyService) -> None:
    """After the crash of a stream, all accepted requests are answered correctly. The other model is not affected."""
    before = loads(faulty, SHAKY)
    # The inputs of each request are in batches of several streams.
    requests = [faulty.texts(6) for _ in range(10)]
    with faulty.undisturbed(), ThreadPoolExecutor(len(requests)) as pool:
        with faulty.held(SHAKY):
            tasks = [pool.submit(faulty.embed, texts, model=SHAKY) for texts in requests]
            wait_until(lambda: faulty.waiting(SHAKY) == 60)
            faulty.control.arm("on-batch", SHAKY, "SystemExit")
        responses = [task.result() for task in tasks]
    assert all(faulty.is_correct(response, texts) for response, texts in zip(responses, requests, strict=True))
    assert loads(faulty, SHAKY) == before + 1
    assert loads(faulty, STEADY) == 1
    wait_until(lambda: faulty.http.get("/ready").status_code == 200)


def test_model_that_fails_on_everything_is_restarted(faulty: FaultyService) -> None:
    """If every forward pass fails, the model is restarted, and all accepted requests are answered."""
    before = loads(faulty, SHAKY)
    # The inputs of each request are in batches of several streams.
    requests = [faulty.texts(12) for _ in range(12)]
    culprit = faulty.texts(1, "broken")
    faulty.control.arm("broken", SHAKY)
    with faulty.undisturbed():
        responses = faulty.embed_together([culprit, *requests], SHAKY)
    assert faulty.control.events("fault", kind="broken")
    assert all(
        faulty.is_correct(response, texts) for response, texts in zip(responses, [culprit, *requests], strict=True)
    )
    assert loads(faulty, SHAKY) == before + 1
    wait_until(lambda: faulty.http.get("/ready").status_code == 200)


@pytest.mark.slow
def test_model_that_cannot_be_restarted_fails_until_it_can_be_loaded(faulty: FaultyService) -> None:
    """After a few attempts it is `failed`, and its requests are rejected. Later requests load it again."""
    culprit, texts = faulty.texts(1, "broken"), faulty.texts(2)
    before = loads(faulty, SHAKY)
    faulty.control.arm("no-load", SHAKY)
    faulty.control.arm("broken", SHAKY)
    with faulty.undisturbed():
        rejected = faulty.embed(culprit, model=SHAKY)
        assert_error(rejected, 503, "model_not_ready", type="server_error", param="model", phrase=SHAKY)
        ready = faulty.http.get("/ready")
        assert ready.status_code == 503
        assert ready.json()["models"][SHAKY]["state"] == "failed"
        assert "planted: it cannot be loaded" in ready.json()["models"][SHAKY]["error"]
        assert ready.json()["models"][STEADY] == {"state": "ready"}
        assert faulty.http.get("/health").status_code == 200
        response = faulty.embed(texts, model=SHAKY)
        assert_error(response, 503, "model_not_ready", type="server_error", param="model")
        assert 1 <= int(response.headers["retry-after"]) <= 120
    assert 1 <= loads(faulty, SHAKY) - before <= 5, "restarts are bounded"
    faulty.control.disarm("no-load", SHAKY)

    def is_loaded_again() -> bool:
        response = faulty.embed(texts, model=SHAKY)
        assert response.status_code in (200, 503)
        return faulty.is_correct(response, texts)

    wait_until(is_loaded_again)
    assert faulty.http.get("/ready").status_code == 200
