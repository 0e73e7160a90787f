"""Progress that a person can see."""

from __future__ import annotations

import io
import logging
import time
from typing import TYPE_CHECKING

from emb_model_provider.hubs.base import Progress
from emb_model_provider.hubs.transfer import ByteCounter, ProgressReporter
from tests.service import wait_until

if TYPE_CHECKING:
    import pytest


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_at_every_tenth(caplog: pytest.LogCaptureFixture) -> None:
    """A thousand callbacks become eleven lines."""
    with caplog.at_level(logging.INFO), ProgressReporter() as report:
        for done in range(1001):
            report(Progress("download", "acme/tiny", done * 1000, 1_000_000))
    assert len(caplog.messages) == 11
    assert caplog.messages[0] == "Downloading acme/tiny: 0.0 of 1.0 MB (0 %)"
    assert caplog.messages[-1] == "Downloading acme/tiny: 1.0 of 1.0 MB (100 %)"


def test_a_slow_transfer_gets_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    """When no tenth is reached, time alone brings a line."""
    with caplog.at_level(logging.INFO), ProgressReporter(every_s=0.05) as report:
        for done in range(3):
            report(Progress("download", "acme/tiny", done, 1_000_000))
            time.sleep(0.06)
    assert len(caplog.messages) == 3


def test_a_terminal_gets_one_line_that_is_redrawn(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is logged there; the line ends when the work does."""
    terminal = Terminal()
    with caplog.at_level(logging.INFO), ProgressReporter(terminal=terminal) as report:
        report(Progress("download", "acme/tiny", 0, 100))
        report(Progress("download", "acme/tiny", 100, 100))
    assert not caplog.messages
    assert terminal.getvalue().count("\n") == 1
    assert terminal.getvalue().count("\r") == 2
    assert "(100 %)" in terminal.getvalue()


def test_silence_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """No byte for a while during a download is a warning; a byte ends it."""
    with caplog.at_level(logging.WARNING), ProgressReporter(stall_s=0.2) as report:
        report(Progress("download", "acme/tiny", 10, 100))
        wait_until(lambda: "acme/tiny: no bytes for" in caplog.text)
        report(Progress("verify", "acme/tiny", 10, 100))
        caplog.clear()
        time.sleep(0.35)
        assert not caplog.messages


def test_a_retry_steps_back_and_never_leaves_the_range() -> None:
    """Bytes that are fetched again are counted once, and the total is never passed."""
    seen: list[int] = []
    counter = ByteCounter("acme/tiny", 100, lambda progress: seen.append(progress.done_bytes))
    for count in (60, -60, 60, 60, -500):
        counter.add(count)
    assert seen == [60, 0, 60, 100, 0]
