"""Every benchmark runs from its command to its tables. No time is asserted: these say nothing about speed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.engine import BATCHES
from benchmarks.workloads import WORKLOADS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def _run(module: str, *arguments: str) -> str:
    command = [sys.executable, "-m", f"benchmarks.{module}", "--quick", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _table(output: str, title: str) -> list[list[str]]:
    """Return the cells of the table under a title, without its head."""
    section = output.split(f"## {title}", 1)[1].split("\n## ", 1)[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return rows[2:]


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"[\d,.]+", cell) is not None and float(cell.replace(",", "")) > 0


def test_serve() -> None:
    """Each workload has a rate for each contender, no request failed, and all vectors are right."""
    output = _run("serve", "--contenders", "ours")
    rates = _table(output, "Requests answered per second")
    assert len(rates) == len(WORKLOADS)
    assert all(len(row) == 2 and _is_number(row[1]) for row in rates)
    closed, opened = _table(output, "Latency in closed loops"), _table(output, "Latency at 70% of capacity")
    assert (len(closed), len(opened)) == (len(WORKLOADS), 2)
    assert {row[6] for row in closed} | {row[8] for row in opened} == {"0"}
    (vectors,) = _table(output, "Vectors")
    assert (vectors[0], vectors[2]) == ("ours", "384")
    assert float(vectors[3]) > 0.995


def test_engine() -> None:
    """Each batch has a rate for each contender and its share of the machine's matrix products."""
    output = _run("engine", "--contenders", "ours")
    for title in ("Texts per second", "Share of the limit"):
        rows = _table(output, title)
        assert len(rows) == len(BATCHES[::3])
        assert all(len(row) == 2 and _is_number(row[1]) for row in rows)


def test_start() -> None:
    """Each server has its time to the first vector and its memory, and answered its load."""
    rows = _table(_run("start", "--contenders", "ours"), "Start and memory")
    assert [row[0] for row in rows] == ["ours, first start", "ours"]
    assert all(_is_number(cell) for row in rows for cell in row[1:5])
    assert {row[5] for row in rows} == {"0"}


def test_restart() -> None:
    """The service comes back, and no request that was sent after the crash failed."""
    (row,) = _table(_run("restart"), "After a crash")
    assert row[0] == "supervisor"
    assert all(map(_is_number, row[1:4]))
    assert row[6] == "0 failed"


def test_memory() -> None:
    """All shapes are run, and memory is read before them and after each step."""
    rows = _table(_run("memory"), "Resident memory by shapes seen")
    assert [row[0] for row in rows] == ["loaded", *map(str, range(10, 121, 10))]
    assert all(_is_number(cell) for row in rows for cell in row[1:])
    peaks = [float(row[2]) for row in rows]
    assert peaks == sorted(peaks)
    assert all(float(row[1]) <= peak for row, peak in zip(rows, peaks, strict=True))


def test_soak() -> None:
    """Under load, with faults and a death of the process, nothing is lost, wrong or unexpected."""
    output = _run("soak")
    counts = {row[0].strip("*"): row[1] for row in _table(output, "Result")}
    assert {counts["wrong answers"], counts["lost answers"], counts["unexpected statuses"]} == {"0"}
    assert _is_number(counts["answered as they must be"])
    assert int(counts["processes that served"]) > 1
    assert _table(output, "Faults")
