"""Processes that crash or hang under a supervisor: they are replaced, and no connection is rejected."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.faults.harness import SHAKY, STEADY
from tests.service import wait_until

if TYPE_CHECKING:
    from tests.faults.conftest import Start
    from tests.faults.harness import FaultyService


@pytest.fixture(scope="module")
def supervised(start: Start) -> FaultyService:
    return start(SUPERVISE="true", WATCHDOG_S="2", supervisor_timings={"heartbeat_timeout_s": 10.0})


def processes(service: FaultyService) -> list[int]:
    """Return the ids of the processes that loaded models. The current one is the last."""
    return list(dict.fromkeys(event["pid"] for event in service.control.events("load")))


@pytest.mark.slow
def test_request_after_a_native_crash_is_answered(supervised: FaultyService) -> None:
    """After SIGSEGV in a forward pass, the next request waits for the new process and is answered correctly."""
    texts, culprit = supervised.texts(2), supervised.texts(1, "segv")
    before = processes(supervised)
    supervised.control.arm("segv", SHAKY)
    with pytest.raises(httpx.TransportError):
        supervised.embed(culprit, model=SHAKY)
    for alias in (STEADY, SHAKY):
        # A new client, without connections to the old process.
        with httpx.Client(base_url=supervised.url, timeout=240, trust_env=False) as client:
            response = client.post("/v1/embeddings", json={"model": alias, "input": texts})
        assert supervised.is_correct(response, texts), response.text
    assert len(processes(supervised)) == len(before) + 1
    assert supervised.process.poll() is None
    assert supervised.is_correct(supervised.embed(culprit, model=SHAKY), culprit)


@pytest.mark.slow
def test_process_with_a_model_that_hangs_is_replaced(supervised: FaultyService) -> None:
    """A forward pass that does not end ends the process, and the new one answers requests."""
    texts, culprit = supervised.texts(2), supervised.texts(1, "hang")
    before = processes(supervised)
    supervised.control.arm("hang", SHAKY)
    with ThreadPoolExecutor(1) as pool:
        task = pool.submit(supervised.embed, culprit, model=SHAKY)
        wait_until(lambda: len(processes(supervised)) > len(before))
        supervised.control.disarm("hang", SHAKY)
        assert isinstance(task.exception(), httpx.TransportError) or task.result().status_code == 503
    supervised.wait()
    for alias in (STEADY, SHAKY):
        assert supervised.is_correct(supervised.embed(texts, model=alias), texts)


@pytest.mark.slow
def test_process_without_heartbeat_is_replaced(supervised: FaultyService) -> None:
    """A stopped process is replaced, and the new one answers requests."""
    texts, stuck = supervised.texts(2), processes(supervised)[-1]
    os.kill(stuck, signal.SIGSTOP)
    wait_until(lambda: processes(supervised)[-1] != stuck)
    supervised.wait()
    for alias in (STEADY, SHAKY):
        assert supervised.is_correct(supervised.embed(texts, model=alias), texts)
    assert "sent no heartbeat for 10 s" in supervised.stderr_text()


def test_shutdown_exits_with_0(supervised: FaultyService) -> None:
    """SIGTERM to the supervisor ends both processes."""
    assert supervised.stop() == 0
