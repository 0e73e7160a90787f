"""Progress of commands, with the warnings of the package between its lines."""

from __future__ import annotations

import io
import logging

import pytest

from emb_model_provider.cli.progress import CommandProgress
from emb_model_provider.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_warning_is_a_line_that_is_not_redrawn() -> None:
    stream = Terminal()
    with CommandProgress("auto", stream=stream) as report:
        report(Progress("download", "acme/tiny", 0, 1000))
        logging.getLogger("modelscope_hub").warning("retry %d/5", 2)
        report(Progress("download", "acme/tiny", 1000, 1000))
    assert stream.getvalue().count("\n") == 1
    assert "\r\x1b[2Kwarning: retry 2/5\n" in stream.getvalue()


@pytest.mark.parametrize("mode", ["plain", "none"])
def test_warnings_are_shown_in_every_mode(mode: str) -> None:
    stream = io.StringIO()
    with CommandProgress(mode, stream=stream):  # type: ignore[arg-type]
        logging.getLogger("emb_model_provider.hubs").warning("slow")
    assert stream.getvalue() == "warning: slow\n"


def test_records_below_warning_are_not_shown() -> None:
    """The level of the package's logger is restored afterwards."""
    package = logging.getLogger("emb_model_provider")
    before = package.level, list(logging.getLogger().handlers)
    stream = io.StringIO()
    with CommandProgress("plain", stream=stream):
        logging.getLogger("emb_model_provider.artifacts").info("compiling")
    assert stream.getvalue() == ""
    assert (package.level, list(logging.getLogger().handlers)) == before
