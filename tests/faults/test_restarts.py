"""A model that breaks is loaded anew, by itself and alone; one that keeps breaking is given up, and says why."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.faults.harness import SHAKY, STEADY
from tests.service import assert_error, wait_until

if TYPE_CHECKING:
    from tests.faults.conftest import Start
    from tests.faults.harness import FaultyService

RETRY_S = 1.0
PATCHES = {
    "emb_model_provider.serving.model_thread:_RESTART_PAUSES_S": [0.0, 0.0, 0.0],
    "emb_model_provider.registry.registry:_FAILED_RETRY_AFTER_S": RETRY_S,
}
"""So that a test need not wait for what it does not look at."""


@pytest.fixture(scope="module")
def faulty(start: Start) -> FaultyService:
    return start(patches=PATCHES)


def loads(service: FaultyService, alias: str) -> int:
    return len(service.control.events("load", alias=alias))


def test_lane_that_dies_loses_nothing(faulty: FaultyService) -> None:
    """When a thread of a model ends, all that was accepted is answered right, and the other model is not touched."""
    before = loads(faulty, SHAKY)
    # Each spans several lanes' batches.
    requests = [faulty.texts(6) for _ in range(10)]
    with faulty.undisturbed(), ThreadPoolExecutor(len(requests)) as pool:
        with faulty.held(SHAKY):
            asked = [pool.submit(faulty.embed, texts, model=SHAKY) for texts in requests]
            wait_until(lambda: faulty.waiting(SHAKY) == 60)
            faulty.control.arm("on-batch", SHAKY, "SystemExit")
        answers = [answer.result() for answer in asked]
    assert all(faulty.is_right(answer, texts) for answer, texts in zip(answers, requests, strict=True))
    assert loads(faulty, SHAKY) == before + 1
    assert loads(faulty, STEADY) == 1
    wait_until(lambda: faulty.http.get("/ready").status_code == 200)


def test_model_that_can_do_nothing_any_more_is_loaded_anew(faulty: FaultyService) -> None:
    """Where every call fails, the inputs are not to blame: the model is loaded anew, and answers what was accepted."""
    before = loads(faulty, SHAKY)
    # Each spans several lanes' batches.
    requests = [faulty.texts(12) for _ in range(12)]
    culprit = faulty.texts(1, "broken")
    faulty.control.arm("broken", SHAKY)
    with faulty.undisturbed():
        answers = faulty.together([culprit, *requests], SHAKY)
    assert faulty.control.events("fault", kind="broken")
    assert all(
        faulty.is_right(answer, texts) for answer, texts in zip(answers, [culprit, *requests], strict=True)
    )
    assert loads(faulty, SHAKY) == before + 1
    wait_until(lambda: faulty.http.get("/ready").status_code == 200)


def test_model_that_keeps_failing_is_given_up_until_its_cause_is_gone(faulty: FaultyService) -> None:
    """After a few restarts it is `failed`, with the reason; its callers are told, the other model answers, and once
    it can be loaded it is back by itself.
    """
    culprit, texts = faulty.texts(1, "broken"), faulty.texts(2)
    before = loads(faulty, SHAKY)
    faulty.control.arm("no-load", SHAKY)
    faulty.control.arm("broken", SHAKY)
    with faulty.undisturbed():
        refused = faulty.embed(culprit, model=SHAKY)
        assert_error(refused, 503, "model_not_ready", type="server_error", param="model", phrase=SHAKY)
        ready = faulty.http.get("/ready")
        assert ready.status_code == 503
        assert ready.json()["models"][SHAKY]["state"] == "failed"
        assert "planted: it cannot be loaded" in ready.json()["models"][SHAKY]["error"]
        assert ready.json()["models"][STEADY] == {"state": "ready"}
        assert faulty.http.get("/health").status_code == 200
        answer = faulty.embed(texts, model=SHAKY)
        assert_error(answer, 503, "model_not_ready", type="server_error", param="model")
        assert 1 <= int(answer.headers["retry-after"]) <= 120
    assert 1 <= loads(faulty, SHAKY) - before <= 5, "restarts are bounded"
    faulty.control.disarm("no-load", SHAKY)

    def answers_again() -> bool:
        answer = faulty.embed(texts, model=SHAKY)
        assert answer.status_code in (200, 503)
        return faulty.is_right(answer, texts)

    wait_until(answers_again)
    assert faulty.http.get("/ready").status_code == 200
