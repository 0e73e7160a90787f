"""Output of commands."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

from emb_model_provider.cli.output import pairs, styled, table
from tests.cli.helpers import SCRIPT
from tests.service import environment

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_the_columns_of_tables_are_aligned() -> None:
    lines = table(("A", "B"), [("long", "x"), ("s", "y")]).splitlines()
    assert lines == ["A     B", "long  x", "s     y"]


def test_pairs_are_aligned() -> None:
    assert pairs([("path", "x"), ("to serve it", "y")]) == "  path         x\n  to serve it  y"


def test_no_color_disables_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert styled("ok", fg="green") != "ok"
    monkeypatch.setenv("NO_COLOR", "1")
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
