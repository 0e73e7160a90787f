"""Counting and cancelling the transfers of the clients."""

from __future__ import annotations

import threading
import time

import pytest

from emb_model_provider.errors import HubUnavailableError, OperationCancelledError
from emb_model_provider.hubs.transfer import ByteCounter, run_all
from emb_model_provider.progress import CancelToken, Progress, ignore_progress


def test_repeated_transfer_is_counted_once() -> None:
    """The sum never exceeds the total, and is never negative."""
    sums: list[int] = []
    counter = ByteCounter("acme/tiny", 100, lambda progress: sums.append(progress.done_bytes), CancelToken())
    for count in (60, -60, 60, 60, -500):
        counter.add(count)
    assert sums == [60, 0, 60, 100, 0]


def test_results_are_in_the_order_of_the_tasks() -> None:
    counter = ByteCounter("acme/tiny", 3, ignore_progress, CancelToken())
    tasks = [lambda: time.sleep(0.1) or 1, lambda: 2, lambda: 3]
    assert run_all(tasks, counter, threads=2) == [1, 2, 3]


def test_error_of_a_task_is_raised() -> None:
    def fail() -> None:
        raise HubUnavailableError("no answer")

    counter = ByteCounter("acme/tiny", 1, ignore_progress, CancelToken())
    with pytest.raises(HubUnavailableError, match="no answer"):
        run_all([fail, lambda: None], counter, threads=1)


def test_cancelled_transfer_abandons_a_thread_that_hangs() -> None:
    """It raises soon, tasks that have not begun do not run, and the thread ends at its next byte."""
    cancel = CancelToken()
    release, ended = threading.Event(), threading.Event()
    ran: list[str] = []
    counter = ByteCounter("acme/tiny", 100, ignore_progress, cancel)

    def hang() -> None:
        release.wait(60)
        try:
            counter.add(1)
        except OperationCancelledError:
            ended.set()

    threading.Timer(0.1, cancel.cancel).start()
    began = time.monotonic()
    with pytest.raises(OperationCancelledError):
        run_all([hang, lambda: ran.append("second")], counter, threads=1)
    assert time.monotonic() - began < 30
    assert not ran
    release.set()
    assert ended.wait(30)


def test_interrupt_ends_the_transfer_but_not_other_work_of_the_caller() -> None:
    cancel = CancelToken()
    interrupts: list[Progress] = []
    counter = ByteCounter("acme/tiny", 100, interrupts.append, cancel)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_all([interrupt], counter, threads=1)
    with pytest.raises(OperationCancelledError):
        counter.add(1)
    assert not cancel.is_cancelled
