"""Progress in a log."""

from __future__ import annotations

import io
import logging
import time
from typing import TYPE_CHECKING

from emb_model_provider.progress import Progress
from emb_model_provider.progress_reporter import ProgressReporter
from tests.service import wait_until

if TYPE_CHECKING:
    import pytest


def test_log_has_a_line_for_every_tenth(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), ProgressReporter("log", stream=io.StringIO()) as report:
        for done in range(1001):
            report(Progress("download", "acme/tiny", done * 1000, 1_000_000))
    assert len(caplog.messages) == 11
    assert caplog.messages[0].startswith("acme/tiny: download 0 B of 1.0 MB (0 %)")
    assert caplog.messages[-1].startswith("acme/tiny: download 1.0 MB of 1.0 MB (100 %)")


def test_slow_download_has_a_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), ProgressReporter("log", stream=io.StringIO(), every_s=0.05) as report:
        for done in range(3):
            report(Progress("download", "acme/tiny", done, 1_000_000))
            time.sleep(0.06)
    assert len(caplog.messages) >= 3


def test_stalled_download_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    """Other phases can take long without a byte."""
    with (
        caplog.at_level(logging.WARNING),
        ProgressReporter("log", stream=io.StringIO(), stall_s=0.2) as report,
    ):
        report(Progress("download", "acme/tiny", 10, 100))
        wait_until(lambda: "acme/tiny: no bytes for" in caplog.text)
        report(Progress("verify", "acme/tiny", 10, 100))
        caplog.clear()
        time.sleep(0.35)
        assert not caplog.messages
