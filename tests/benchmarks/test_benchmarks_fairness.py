"""The fairness benchmark runs from its command to its table. No time is asserted."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


def test_fairness() -> None:
    """Single texts have their latencies alone and beside large requests, and none failed."""
    command = [sys.executable, "-m", "benchmarks.fairness", "--quick", "--large", "short-float"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if line.startswith("|")][2:]
    assert [row[0] for row in rows] == ["nothing else", "64 short texts, float"]
    assert all(float(cell.replace(",", "")) > 0 for cell in [*rows[0][3:6], *rows[1][1:7]])
    assert {row[-1] for row in rows} == {"0"}
