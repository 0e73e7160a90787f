"""How figures and progress look, on a terminal and elsewhere."""

from __future__ import annotations

import io
import json
import logging
import subprocess
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.cli.output import styled, table
from emb_model_provider.cli.progress import Reporter, describe
from emb_model_provider.formatting import format_age, format_duration, format_size
from emb_model_provider.hubs.base import Progress
from tests.cli.running import SCRIPT
from tests.service import environment, wait_until

if TYPE_CHECKING:
    from pathlib import Path


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def fetch(report: Reporter, total: int = 1000, steps: int = 100) -> None:
    report(Progress("resolve", "acme/tiny"))
    for done in range(0, total + 1, total // steps):
        report(Progress("download", "acme/tiny", done, total))
    report(Progress("verify", "acme/tiny", total, total))


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (90_868_376, "90.9 MB"),
        (999_960, "1.0 MB"),
        (1.2e9, "1.2 GB"),
        (None, "-"),
    ],
)
def test_sizes_are_in_powers_of_1000(count: float | None, shown: str) -> None:
    """Three figures at most, and the unit that disks are sold in."""
    assert format_size(count) == shown


def test_times_are_told_as_people_do() -> None:
    """How long ago, and how long."""
    now = datetime(2030, 1, 2, tzinfo=UTC)
    assert [format_age(now - timedelta(seconds=s), now) for s in (5, 60, 7200, 3 * 86_400)] == [
        "just now",
        "1 minute ago",
        "2 hours ago",
        "3 days ago",
    ]
    assert [format_duration(s) for s in (5, 65, 7384)] == ["0:05", "1:05", "2:03:04"]


def test_tables_have_columns() -> None:
    """Each begins where its head does, and no line ends in spaces."""
    lines = table(("A", "B"), [("long", "x"), ("s", "y")]).splitlines()
    assert lines == ["A     B", "long  x", "s     y"]


def test_progress_elsewhere_is_a_line_every_tenth() -> None:
    """A hundred steps give no more than a line for each tenth, and one for each phase, each whole."""
    stream = io.StringIO()
    with Reporter("auto", stream=stream, every_s=600) as report:
        fetch(report)
        report.phase("ready")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "acme/tiny: resolve"
    assert lines[-1] == "acme/tiny: ready"
    downloads = [line for line in lines if ": download" in line]
    assert 10 <= len(downloads) <= 11
    assert downloads[-1].startswith("acme/tiny: download 1.0 kB of 1.0 kB (100 %)")
    assert "\r" not in stream.getvalue()


def test_progress_on_a_terminal_is_one_line() -> None:
    """It is redrawn in place and gone in the end; a warning stands on a line of its own."""
    stream = Terminal()
    with Reporter("auto", stream=stream) as report:
        fetch(report)
        logging.getLogger("modelscope_hub").warning("retry 2/5")
    shown = stream.getvalue()
    assert shown.count("\n") == 1
    assert "\r\x1b[2Kwarning: retry 2/5\n" in shown
    assert "acme/tiny: verify 1.0 kB of 1.0 kB (100 %)" in shown


def test_progress_as_json_is_an_object_a_line() -> None:
    """Bytes are integers; what is not known is null."""
    stream = io.StringIO()
    with Reporter("json", stream=stream) as report:
        fetch(report)
        report.note("careful")
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert lines[0] == {
        "model": "acme/tiny", "phase": "resolve", "done_bytes": None, "total_bytes": None, "bytes_per_s": None,
        "seconds_left": None,
    }  # fmt: skip
    assert (lines[-2]["phase"], lines[-2]["done_bytes"], lines[-2]["total_bytes"]) == ("verify", 1000, 1000)
    assert lines[-1] == {"model": "acme/tiny", "note": "careful"}


def test_progress_none_is_silent() -> None:
    """But for warnings, which nobody asked to lose."""
    stream = io.StringIO()
    with Reporter("none", stream=stream) as report:
        fetch(report)
        logging.getLogger("emb_model_provider.hubs").warning("odd")
    assert stream.getvalue() == "warning: odd\n"


def test_a_stall_says_so() -> None:
    """A download without a byte for a while has a line that says for how long."""
    stream = io.StringIO()
    with Reporter("plain", stream=stream, stall_s=0.05) as report:
        report(Progress("download", "acme/tiny", 10, 100))
        wait_until(lambda: "acme/tiny: no bytes for 0 s, still trying" in stream.getvalue())


def test_phases_of_compiling_are_told_from_its_log() -> None:
    """The compile step's own comparing is `compare`; what it does before is `compile`."""
    stream = io.StringIO()
    with Reporter("plain", stream=stream) as report:
        report.model("small")
        for name in ("import", "export", "reference vectors", "verify", "write"):
            logging.getLogger("emb_model_provider.artifacts.compiler_process").debug(
                "", extra={"compile_phase": name}
            )
    assert stream.getvalue().splitlines() == ["small: compile", "small: compare"]


def test_time_left_follows_from_the_speed() -> None:
    """Both are told of a download, after its one total."""
    line = describe("m", "download", 25_000_000, 100_000_000, 5_000_000, 15.0, 5.0)
    assert line == "m: download 25.0 MB of 100 MB (25 %), 5.0 MB/s, 0:15 left"
    assert describe("m", "compile", 0, None, None, None, 75.0) == "m: compile, 1:15"


def test_speed_is_that_of_the_last_seconds() -> None:
    """It is known once bytes came, and only for a download."""
    stream = io.StringIO()
    with Reporter("json", stream=stream) as report:
        report(Progress("download", "m", 0, 100))
        time.sleep(0.02)
        report(Progress("download", "m", 50, 100))
        report(Progress("verify", "m", 50, 100))
    speeds = [json.loads(line)["bytes_per_s"] for line in stream.getvalue().splitlines()]
    assert speeds[0] is None
    assert 0 < speeds[1] <= 2500
    assert speeds[2] is None


def test_no_color_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NO_COLOR set to anything, no text is colored."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert styled("ok", fg="green") != "ok"
    monkeypatch.setenv("NO_COLOR", "1")
    assert styled("ok", fg="green") == "ok"


def test_a_terminal_without_unicode_gets_ascii(tmp_path: Path) -> None:
    """A name that stdout's encoding lacks is shown escaped, and breaks nothing."""
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
