"""Forward passes that hang: status of the model, and end of the process."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.faults.harness import SHAKY, STEADY, FaultyService
from tests.service import assert_error, wait_until

if TYPE_CHECKING:
    from pathlib import Path

    from tests.faults.conftest import Start

WATCHDOG_S = 2


@pytest.fixture(scope="module")
def faulty(start: Start) -> FaultyService:
    return start(WATCHDOG_S=str(WATCHDOG_S), SHUTDOWN_GRACE_S="1")


def test_hang_is_reported_until_it_ends(faulty: FaultyService) -> None:
    """A model that hangs rejects requests and recovers when its batch ends. The other model is not affected."""
    texts = faulty.texts(3)
    with faulty.undisturbed():
        with faulty.held(SHAKY):  # which checks the responses of the requests that hang
            time.sleep(WATCHDOG_S)  # now all streams have been running for longer
            wait_until(lambda: faulty.state(SHAKY) == "hung")
            ready = faulty.http.get("/ready")
            assert ready.status_code == 503
            assert "running for" in ready.json()["models"][SHAKY]["error"]
            assert ready.json()["models"][STEADY] == {"state": "ready"}
            assert faulty.http.get("/health").status_code == 200
            rejected = faulty.embed(texts, model=SHAKY)
            assert_error(rejected, 503, "model_not_ready", type="server_error", param="model", phrase="hangs")
            assert 1 <= int(rejected.headers["retry-after"]) <= 120
        wait_until(lambda: faulty.http.get("/ready").status_code == 200)
    assert faulty.is_correct(faulty.embed(texts, model=SHAKY), texts)
    assert len(faulty.control.events("load", alias=SHAKY)) == 1


@pytest.mark.slow
def test_sigterm_ends_a_process_that_hangs(faulty: FaultyService) -> None:
    """A request that hangs gets the grace period like any other. Then the process shuts down with exit code 0."""
    signal_while_hanging(faulty, [signal.SIGTERM])
    assert faulty.ended() == 0


def test_second_signal_ends_a_process_that_hangs_at_once(tmp_path: Path, service_cache: str, backend: str) -> None:
    """The process does not wait for the end of the grace period, and exits with 128 + the number of the signal."""
    with FaultyService(tmp_path, CACHE_DIR=service_cache, BACKEND=backend, SHUTDOWN_GRACE_S="3000") as service:
        service.wait()
        took_s = signal_while_hanging(service, [signal.SIGTERM, signal.SIGTERM])
        assert service.ended() == 128 + signal.SIGTERM
        assert took_s < 30


def signal_while_hanging(service: FaultyService, signals: list[signal.Signals]) -> float:
    """Send signals while a model hangs; return the seconds from the last signal to the end of the process."""
    text = service.texts(1, "hang")
    service.control.arm("hang", SHAKY)
    before = len(service.control.events("fault", kind="hang"))
    with ThreadPoolExecutor(1) as pool:
        # The connection is closed, or the request fails at the end of the grace period.
        request = pool.submit(service.embed, text, model=SHAKY)
        wait_until(lambda: len(service.control.events("fault", kind="hang")) > before)
        first, *others = signals
        service.signal(first)
        for number in others:
            # Two signals at the same moment count as one.
            wait_until(lambda: "shutting down (" in service.log_text())
            service.signal(number)
        signaled = time.monotonic()
        service.ended()
        took_s = time.monotonic() - signaled
        if request.exception() is None:
            assert request.result().status_code >= 500
    return took_s
