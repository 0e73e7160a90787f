"""Output of commands, and their progress with the warnings of the package between its lines."""

from __future__ import annotations

import io
import logging
import subprocess
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.cli.output import pairs, show_progress, styled, table
from emb_model_provider.progress import Progress
from tests.cli.helpers import SCRIPT
from tests.service import environment

if TYPE_CHECKING:
    from pathlib import Path

    from emb_model_provider.progress import Mode


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_columns_of_tables_are_aligned() -> None:
    lines = table(("A", "B"), [("long", "x"), ("s", "y")]).splitlines()
    assert lines == ["A     B", "long  x", "s     y"]


def test_pairs_are_aligned() -> None:
    assert pairs([("path", "x"), ("to serve it", "y")]) == "  path         x\n  to serve it  y"


def test_no_color_disables_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert styled("ok", fg="green") != "ok"
    monkeypatch.setenv("NO_COLOR", "1")
    assert styled("ok", fg="green") == "ok"


def test_a_dumb_terminal_has_no_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "dumb")
    assert styled("ok", fg="green") == "ok"


def test_a_stream_without_unicode_gets_ascii(tmp_path: Path) -> None:
    """Characters that the encoding lacks are escaped."""
    done = subprocess.run(
        [str(SCRIPT), "show", "模型"],
        cwd=tmp_path,
        env=environment(tmp_path) | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        encoding="ascii",
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert "\\u6a21\\u578b" in done.stderr
    assert "Traceback" not in done.stderr


# --- progress -----------------------------------------------------------------------------------------


def test_a_warning_is_a_line_that_is_not_redrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    client = logging.getLogger("modelscope_hub")
    # As the service configures it, whatever a client of another test has done.
    monkeypatch.setattr(client, "handlers", [])
    monkeypatch.setattr(client, "propagate", True)
    with show_progress("auto") as report:
        report(Progress("download", "acme/tiny", 0, 1000))
        client.warning("retry %d/5", 2)
        report(Progress("download", "acme/tiny", 1000, 1000))
    assert stream.getvalue().count("\n") == 1
    assert "\r\x1b[2Kwarning: retry 2/5\n" in stream.getvalue()


@pytest.mark.parametrize("mode", ["plain", "none"])
def test_warnings_are_shown_once_in_every_mode(mode: Mode, capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress(mode):
        for _ in range(2):
            logging.getLogger("emb_model_provider.hubs").warning("slow")
    assert capsys.readouterr().err == "warning: slow\n"


def test_records_below_warning_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """The handlers of the root logger are restored afterwards."""
    before = list(logging.getLogger().handlers)
    with show_progress("plain"):
        logging.getLogger("emb_model_provider.artifacts").info("compiling")
    assert capsys.readouterr().err == ""
    assert logging.getLogger().handlers == before
