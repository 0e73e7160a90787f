"""A process that dies is replaced before anybody is refused a connection."""

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
    patches = {"emb_model_provider.main:SHORTEST_SILENCE_S": 10.0}
    return start(SUPERVISE="true", WATCHDOG_S="2", patches=patches)


def processes(service: FaultyService) -> list[int]:
    """Return the ids of the processes that loaded models, the present one last."""
    return list(dict.fromkeys(event["pid"] for event in service.control.events("load")))


def test_native_crash_is_followed_by_the_next_right_answer(supervised: FaultyService) -> None:
    """After SIGSEGV in a forward pass the next request waits for the new process, and is answered right."""
    texts, culprit = supervised.texts(2), supervised.texts(1, "segv")
    before = processes(supervised)
    supervised.control.arm("segv", SHAKY)
    with pytest.raises(httpx.TransportError):
        supervised.embed(culprit, model=SHAKY)
    for alias in (STEADY, SHAKY):
        # A client of its own: no connection of the old process.
        with httpx.Client(base_url=supervised.url, timeout=240, trust_env=False) as client:
            answer = client.post("/v1/embeddings", json={"model": alias, "input": texts})
        assert supervised.is_right(answer, texts), answer.text
    assert len(processes(supervised)) == len(before) + 1
    assert supervised.process.poll() is None
    assert supervised.is_right(supervised.embed(culprit, model=SHAKY), culprit)


def test_process_that_hangs_is_replaced(supervised: FaultyService) -> None:
    """A forward pass that never ends costs the process; the new one answers."""
    texts, culprit = supervised.texts(2), supervised.texts(1, "hang")
    before = processes(supervised)
    supervised.control.arm("hang", SHAKY)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(supervised.embed, culprit, model=SHAKY)
        wait_until(lambda: len(processes(supervised)) > len(before))
        supervised.control.disarm("hang", SHAKY)
        assert isinstance(asked.exception(), httpx.TransportError) or asked.result().status_code == 503
    supervised.wait()
    for alias in (STEADY, SHAKY):
        assert supervised.is_right(supervised.embed(texts, model=alias), texts)


def test_process_that_is_stuck_as_a_whole_is_replaced(supervised: FaultyService) -> None:
    """One that shows no sign of life any more, event loop and all, costs only those who were connected to it."""
    texts, stuck = supervised.texts(2), processes(supervised)[-1]
    os.kill(stuck, signal.SIGSTOP)
    wait_until(lambda: processes(supervised)[-1] != stuck)
    supervised.wait()
    for alias in (STEADY, SHAKY):
        assert supervised.is_right(supervised.embed(texts, model=alias), texts)
    assert "gave no sign of life for 10 s" in supervised.stderr_text()


def test_end_is_clean(supervised: FaultyService) -> None:
    """SIGTERM to the supervisor ends both, with 0."""
    assert supervised.stop() == 0
