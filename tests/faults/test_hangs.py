"""A forward pass that does not end is noticed and said, and cannot keep the process from ending."""

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


def test_hang_is_told_and_ends(faulty: FaultyService) -> None:
    """A model that hangs says so, refuses what comes, and is well once it is through; its own requests are answered,
    and the other model never notices.
    """
    texts = faulty.texts(3)
    with faulty.undisturbed():
        with faulty.held(SHAKY):  # whose own requests are found to be answered right at the block's end
            time.sleep(WATCHDOG_S)  # all lanes have been at it for longer now
            wait_until(lambda: faulty.state(SHAKY) == "hung")
            ready = faulty.http.get("/ready")
            assert ready.status_code == 503
            assert "running for" in ready.json()["models"][SHAKY]["error"]
            assert ready.json()["models"][STEADY] == {"state": "ready"}
            assert faulty.http.get("/health").status_code == 200
            answer = faulty.embed(texts, model=SHAKY)
            assert_error(answer, 503, "model_not_ready", type="server_error", param="model", phrase="hangs")
            assert 1 <= int(answer.headers["retry-after"]) <= 120
        wait_until(lambda: faulty.http.get("/ready").status_code == 200)
    assert faulty.is_right(faulty.embed(texts, model=SHAKY), texts)
    assert len(faulty.control.events("load", alias=SHAKY)) == 1


def test_sigterm_ends_a_process_that_hangs(faulty: FaultyService) -> None:
    """What hangs gets the grace period like any request, and then the process ends, in good order."""
    end_while_held(faulty, [signal.SIGTERM])
    assert faulty.ended() == 0


def test_second_signal_ends_at_once(tmp_path: Path, service_cache: str, backend: str) -> None:
    """Whoever asks twice does not wait for the grace period."""
    with FaultyService(
        tmp_path, CACHE_DIR=service_cache, BACKEND=backend, SHUTDOWN_GRACE_S="3000"
    ) as service:
        service.wait()
        end_while_held(service, [signal.SIGTERM, signal.SIGTERM])
        service.ended()


def end_while_held(service: FaultyService, signals: list[signal.Signals]) -> None:
    """Send signals to a process one of whose models hangs for good."""
    text = service.texts(1, "hang")
    service.control.arm("hang", SHAKY)
    before = len(service.control.events("fault", kind="hang"))
    with ThreadPoolExecutor(1) as pool:
        # No answer will come: the connection ends with the process, or with a refusal in the grace's end.
        asked = pool.submit(service.embed, text, model=SHAKY)
        wait_until(lambda: len(service.control.events("fault", kind="hang")) > before)
        for number, one in enumerate(signals, 1):
            service.signal(one)
            if number < len(signals):
                # The next one must find the first one seen.
                wait_until(lambda: "finishing the requests" in service.log_text())
        service.ended()
        if asked.exception() is None:
            assert asked.result().status_code >= 500
