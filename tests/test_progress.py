"""Progress on terminals, in files, as JSON and as log lines."""

from __future__ import annotations

import io
import json
import logging
import os
import pty
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from fcntl import ioctl
from struct import pack
from termios import TIOCSWINSZ
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import OperationCancelledError
from emb_model_provider.progress import Progress, ProgressReporter, RateMeter, Status, measure_work
from tests.service import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.progress import WorkRecord

LONG_NAME = "sentence-transformers/paraphrase-multilingual-mpnet-base-v2"
NAMES = ("small", LONG_NAME, "/data/模型/多语言句子向量模型-第二版")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def shown(self) -> list[str]:
        """Return the lines that were drawn one over the other."""
        return self.getvalue().split("\r\x1b[2K")[1:]


def download(report: ProgressReporter, total: int = 1000, steps: int = 100) -> None:
    report(Progress("resolve", "acme/tiny"))
    for done in range(0, total + 1, total // steps):
        report(Progress("download", "acme/tiny", done, total))
    report(Progress("verify", "acme/tiny", total, total))


# --- plain lines --------------------------------------------------------------------------------------


def test_a_file_gets_a_line_per_phase_and_tenth() -> None:
    stream = io.StringIO()
    with ProgressReporter("auto", stream=stream, every_s=600) as report:
        download(report)
        report.done()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "acme/tiny: resolve"
    assert len([line for line in lines if ": download" in line]) == 11
    assert lines[-3].startswith("acme/tiny: download 1.0 kB of 1.0 kB (100 %)")
    assert lines[-2:] == ["acme/tiny: verify 1.0 kB of 1.0 kB (100 %)", "acme/tiny: ready"]
    assert "\r" not in stream.getvalue()


def test_a_slow_phase_gets_a_line_now_and_then() -> None:
    """Even if nothing is reported, as while a model is compiled."""
    stream = io.StringIO()
    with ProgressReporter("plain", stream=stream, every_s=0.05, stall_s=0.1) as report:
        report(Progress("compile", "acme/tiny", step="convert"))
        wait_until(lambda: stream.getvalue().count("acme/tiny: compile (convert)") >= 3)


def test_a_slow_transfer_gets_a_line_now_and_then() -> None:
    stream = io.StringIO()
    with ProgressReporter("plain", stream=stream, every_s=0.05) as report:
        for done in range(3):
            report(Progress("download", "acme/tiny", done, 1_000_000))
            time.sleep(0.06)
    assert len(stream.getvalue().splitlines()) >= 3


def test_the_name_that_is_set_replaces_the_repository() -> None:
    """Setting the same name again does not begin a phase again."""
    stream = io.StringIO()
    with ProgressReporter("plain", stream=stream) as report:
        for _ in range(2):
            report.model("small")
            report(Progress("load", "acme/tiny"))
        report.model("other")
        report(Progress("load", "acme/tiny"))
    assert stream.getvalue().splitlines() == ["small: load", "other: load"]


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    with ProgressReporter("auto", stream=stream) as report:
        report(Progress("load", "acme/tiny"))
    assert stream.getvalue() == "acme/tiny: load\n"


# --- terminals ----------------------------------------------------------------------------------------


def test_a_terminal_gets_one_line_that_is_redrawn() -> None:
    """It is removed at the end."""
    stream = Terminal()
    with ProgressReporter("auto", stream=stream) as report:
        download(report)
    assert "\n" not in stream.getvalue()
    assert stream.shown()[0] == "acme/tiny: resolve"
    assert stream.shown()[-2:] == ["acme/tiny: verify 1.0 kB of 1.0 kB (100 %)", ""]


def test_a_terminal_is_redrawn_several_times_a_second_at_most() -> None:
    stream = Terminal()
    with ProgressReporter("auto", stream=stream) as report:
        for done in range(10_000):
            report(Progress("download", "acme/tiny", done, 1_000_000))
    assert len(stream.shown()) < 100


def test_narrow_terminals_show_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes and phase are left out, and the name is shortened, so that the line never wraps."""
    shown: dict[tuple[str, int], str] = {}

    def show(name: str, columns: int) -> None:
        stream = Terminal()
        with ProgressReporter("auto", stream=stream, estimate_s=0.5) as report:
            report.model(name)
            report(Progress("download", "acme/tiny", 0, 90_900_000))
            time.sleep(0.6)
            report(Progress("download", "acme/tiny", 12_000_000, 90_900_000))
        shown[name, columns] = stream.shown()[-2]

    for columns in (30, 40, 80, 120):
        monkeypatch.setenv("COLUMNS", str(columns))
        with ThreadPoolExecutor() as threads:
            list(threads.map(show, NAMES, [columns] * len(NAMES)))
    assert len(shown) == 4 * len(NAMES)
    for (name, columns), line in shown.items():
        assert re.search(r"\b13 %\)?, \d+(\.\d)? MB/s, 0:0\d left$", line)
        assert len(line) + len(re.findall(r"[一-龥]", line)) < columns
        if columns == 120:
            assert line.startswith(f"{name}: download 12.0 MB of 90.9 MB (13 %), ")
        elif columns == 80:
            assert ": download 12.0 MB of 90.9 MB (13 %), " in line
        elif columns == 40 and name == LONG_NAME:
            assert line.startswith("...")
            assert LONG_NAME.endswith(line.removeprefix("...").partition(":")[0])


@pytest.mark.parametrize("name", NAMES)
def test_a_terminal_of_80_columns_shows_percentage_rate_and_time_left(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a real terminal, in lines that do not wrap; while compiling, the step and the time left."""
    monkeypatch.setenv("TERM", "xterm")
    ours, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, pack("HHHH", 24, 80, 0, 0))
    stream = os.fdopen(theirs, "w", encoding="utf-8")
    with stream, ProgressReporter("auto", stream=stream, estimate_s=0.5) as report:
        report.model(name)
        report(Progress("download", name, 0, 2_300_000_000))
        time.sleep(0.6)
        report(Progress("download", name, 1_234_000_000, 2_300_000_000))
        report(Progress("compare", name, step="reference vectors", step_number=5, step_count=6, seconds_left=40.0))
    raw = b""
    with suppress(OSError):  # the end
        while piece := os.read(ours, 100_000):
            raw += piece
    os.close(ours)
    shown = raw.decode().split("\r\x1b[2K")
    *_, downloading, comparing, _ = shown
    assert re.search(r"53 %\)?, \d+(\.\d)? [MG]B/s, 0:0\d left$", downloading)
    assert re.search(r"step 5 of 6( \(reference vectors\))?, about 40 s left$", comparing)
    assert all(len(line) + len(re.findall(r"[一-龥]", line)) < 80 for line in shown)


def test_the_width_is_that_of_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of stdout, which can be a file."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    ours, theirs = pty.openpty()
    ioctl(theirs, TIOCSWINSZ, pack("HHHH", 24, 40, 0, 0))
    with os.fdopen(theirs, "w", encoding="utf-8") as stream:
        with ProgressReporter("auto", stream=stream) as report:
            report(Progress("download", LONG_NAME, 12_000_000, 90_900_000))
        shown = os.read(ours, 10_000).decode().split("\r\x1b[2K")[1]
    os.close(ours)
    assert shown.endswith("13 %")
    assert len(shown) < 40


# --- JSON ---------------------------------------------------------------------------------------------


def test_json_has_an_object_per_line() -> None:
    """Bytes are integers. Unknown values are null."""
    stream = io.StringIO()
    with ProgressReporter("json", stream=stream) as report:
        download(report)
        report.note("careful")
        report.done()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    no_step = {"step": None, "step_number": None, "step_count": None}
    unknown = {**no_step, "done_bytes": None, "total_bytes": None, "bytes_per_s": None, "seconds_left": None}
    assert lines[0] == {"model": "acme/tiny", "phase": "resolve", **unknown}
    assert lines[1] == {
        "model": "acme/tiny", "phase": "download", **no_step, "done_bytes": 0, "total_bytes": 1000, "bytes_per_s": None,
        "seconds_left": None,
    }  # fmt: skip
    assert (lines[-3]["phase"], lines[-3]["done_bytes"], lines[-3]["total_bytes"]) == ("verify", 1000, 1000)
    assert lines[-2] == {"model": "acme/tiny", "note": "careful"}
    assert lines[-1] == {"model": "acme/tiny", "phase": "ready", **unknown}


def test_steps_of_compiling_have_numbers() -> None:
    """In lines and in JSON, with the estimate of the compiler."""
    for mode, expected in (("plain", "acme/tiny: compile, step 3 of 6 (export), about 20 s left"), ("json", None)):
        stream = io.StringIO()
        with ProgressReporter(mode, stream=stream) as report:  # type: ignore[arg-type]
            report(Progress("compile", "acme/tiny", step="export", step_number=3, step_count=6, seconds_left=17.0))
        line = stream.getvalue().splitlines()[0]
        if expected is not None:
            assert line == expected
        else:
            values = json.loads(line)
            assert [values[name] for name in ("step", "step_number", "step_count", "seconds_left")] == [
                "export",
                3,
                6,
                17,
            ]


def test_json_has_rate_and_time_left() -> None:
    stream = io.StringIO()
    with ProgressReporter("json", stream=stream, estimate_s=0.5) as report:
        report(Progress("download", "acme/tiny", 0, 100_000))
        time.sleep(0.6)
        report(Progress("download", "acme/tiny", 50_000, 100_000))
        report(Progress("compile", "acme/tiny"))
    line, compiling = [json.loads(line) for line in stream.getvalue().splitlines()][-2:]
    assert 0 < line["bytes_per_s"] <= 50_000 / 0.6
    assert line["seconds_left"] in (0, 1)
    assert (compiling["bytes_per_s"], compiling["seconds_left"]) == (None, None)


# --- no output, and log lines -------------------------------------------------------------------------


def test_none_shows_only_notes() -> None:
    stream = io.StringIO()
    with ProgressReporter("none", stream=stream, every_s=0, stall_s=0.04) as report:
        download(report)
        time.sleep(0.05)
        report.note("careful")
        report.done()
    assert stream.getvalue() == "careful\n"


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()], ids=["file", "terminal"])
def test_a_log_gets_a_line_per_download_and_warnings(stream: io.StringIO, caplog: pytest.LogCaptureFixture) -> None:
    """Also on a terminal, where other log lines would overwrite a line that is redrawn."""
    with caplog.at_level(logging.INFO), ProgressReporter("log", stream=stream, every_s=600) as report:
        download(report)
        report.note("careful")
    assert stream.getvalue() == ""
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "acme/tiny: download 0 B of 1.0 kB (0 %)"),
        ("WARNING", "careful"),
    ]


def test_a_slow_phase_gets_a_log_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), ProgressReporter("log", every_s=0.05, stall_s=0.1) as report:
        report(Progress("compile", "acme/tiny", step="convert"))
        wait_until(lambda: caplog.messages.count("acme/tiny: compile (convert)") >= 2)


def test_phases_that_alternate_get_a_log_line_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), ProgressReporter("log", every_s=0.2) as report:
        for _ in range(10):
            report(Progress("compile", "acme/tiny", step="convert"))
            report(Progress("compare", "acme/tiny", step="verify"))
            time.sleep(0.03)
    assert 1 <= len(caplog.messages) < 20


def test_a_process_without_stderr_logs(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr", None)
    with caplog.at_level(logging.INFO), ProgressReporter("log") as report:
        report(Progress("download", "acme/tiny"))
    assert caplog.messages == ["acme/tiny: download"]


# --- stalls and rates ---------------------------------------------------------------------------------


def test_a_stalled_download_is_reported() -> None:
    stream = io.StringIO()
    with ProgressReporter("plain", stream=stream, stall_s=0.05) as report:
        report(Progress("download", "acme/tiny", 10, 100))
        wait_until(lambda: "acme/tiny: no bytes for 0 s, still trying" in stream.getvalue())


def test_a_phase_without_bytes_does_not_stall() -> None:
    stream = io.StringIO()
    with ProgressReporter("plain", stream=stream, stall_s=0.05) as report:
        report(Progress("verify", "acme/tiny", 10, 100))
        time.sleep(0.2)
    assert "no bytes" not in stream.getvalue()


def test_the_rate_follows_the_last_seconds() -> None:
    """10 s at 1 MB/s, then 10 s at 5 MB/s."""
    meter = RateMeter(0, now=0.0)
    assert meter.bytes_per_s is None
    for second in range(1, 11):
        meter.update(second * 1_000_000, float(second))
    assert meter.bytes_per_s == pytest.approx(1_000_000)
    for second in range(1, 11):
        meter.update(10_000_000 + second * 5_000_000, 10.0 + second)
    assert meter.bytes_per_s is not None
    assert 4_000_000 < meter.bytes_per_s <= 5_000_000


def test_the_rate_falls_while_nothing_arrives() -> None:
    meter = RateMeter(0, now=0.0)
    meter.update(1_000_000, 1.0)
    for second in range(2, 12):
        meter.update(1_000_000, float(second))
    assert meter.bytes_per_s is not None
    assert meter.bytes_per_s < 150_000
    for second in range(12, 100):
        meter.update(1_000_000, float(second))
    assert meter.bytes_per_s is None


def test_a_file_that_is_downloaded_again_does_not_make_the_rate_negative() -> None:
    meter = RateMeter(0, now=0.0)
    meter.update(1_000_000, 1.0)
    meter.update(0, 2.0)
    meter.update(1_000_000, 3.0)
    assert meter.bytes_per_s == pytest.approx(1_000_000)


def bursts(second: float) -> float:
    """20 MB every 4 s, after ten seconds of small files."""
    return 100_000 * second if second < 10 else 1_000_000 + 20_000_000 * ((second - 10) // 4)


def fast_and_slow(second: float) -> float:
    """Alternately 10 s at 8 MB/s and 10 s at 2 MB/s."""
    cycles, rest = divmod(second, 20)
    return cycles * 100e6 + (rest * 8e6 if rest < 10 else 80e6 + (rest - 10) * 2e6)


@pytest.mark.parametrize("arrived", [bursts, fast_and_slow])
def test_the_estimate_does_not_jump(arrived: Callable[[float], float]) -> None:
    """From one second to the next it changes by less than a third, and it is near the actual time."""
    meter = RateMeter(0, now=0.0)
    total, estimates = int(arrived(300.0)), {}
    for tenth in range(1, 2950):
        done = int(arrived(tenth / 10))
        meter.update(done, tenth / 10)
        if tenth % 10 == 0:
            estimates[tenth // 10] = meter.seconds_for(total - done)
    known = {second: left for second, left in estimates.items() if left is not None and 25 <= second < 260}
    assert len(known) == 235
    for second in range(26, 260):
        assert 0.67 < known[second] / known[second - 1] < 1.5, second
    assert all(0.5 < known[second] / (300 - second) < 2 for second in range(40, 260))


def test_bytes_of_an_earlier_download_are_no_rate() -> None:
    """A download that resumes does not seem to be fast."""
    stream = io.StringIO()
    with ProgressReporter("json", stream=stream, estimate_s=0) as report:
        report(Progress("download", "acme/tiny", 0, 10**9))
        time.sleep(0.6)
        report(Progress("download", "acme/tiny", 9 * 10**8, 10**9, resumed_bytes=9 * 10**8 - 60_000))
    line = json.loads(stream.getvalue().splitlines()[-1])
    assert line["done_bytes"] == 9 * 10**8
    assert line["bytes_per_s"] <= 100_000
    assert line["seconds_left"] >= 1000


def test_descriptions() -> None:
    download = Status(
        phase="download", done_bytes=25_000_000, total_bytes=100_000_000, bytes_per_s=5e6, seconds_left=15.0
    )
    assert download.descriptions()[0] == "download 25.0 MB of 100 MB (25 %), 5.0 MB/s, 0:15 left"
    assert Status(phase="compile", step="convert", elapsed_s=75.0).descriptions()[0] == "compile (convert), 1:15"
    assert Status(phase="ready").descriptions()[0] == "ready"


def test_progress_and_cancellation_do_not_import_tqdm() -> None:
    """Its import takes longer than all other imports of the module."""
    program = "import sys, emb_model_provider.progress; sys.exit('tqdm' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


# --- records of work ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "outcome"), [(None, "ok"), (OperationCancelledError("stopped"), "cancelled"), (OSError("full"), "failed")]
)
def test_work_is_recorded_however_it_ends(error: Exception | None, outcome: str) -> None:
    """With the bytes of all repositories, without those of an earlier download."""
    records: list[WorkRecord] = []
    reports: list[Progress] = []
    with (
        suppress(OSError, OperationCancelledError),
        measure_work("download", "a", reports.append, records.append) as on,
    ):
        on(Progress("resolve", "a"))
        on(Progress("download", "a", 50, 100, resumed_bytes=20))
        on(Progress("download", "a", 100, 100, resumed_bytes=20))
        on(Progress("download", "base of a", 7, 7))
        if error is not None:
            raise error
    (record,) = records
    assert (record.kind, record.model, record.outcome, record.transferred_bytes) == ("download", "a", outcome, 80 + 7)
    assert len(reports) == 4


def test_nothing_is_recorded_if_there_was_nothing_to_do() -> None:
    """A model that is on disk is verified, and not downloaded."""
    records: list[WorkRecord] = []
    with measure_work("download", "a", lambda _: None, records.append) as on:
        on(Progress("verify", "a", 10, 10))
    assert records == []
