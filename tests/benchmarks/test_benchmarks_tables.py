"""Numbers in tables say what was measured."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.engine import Model
from benchmarks.reference import Reference
from benchmarks.resources import process_tree, resident_mib, usage
from benchmarks.table import number, ratios, spread, table


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1234.5, "1,234"), (99.94, "99.9"), (2.5, "2.50"), (0.0123, "0.0123"), (0.0, "0"), (float("nan"), "–")],
)
def test_numbers_keep_three_digits(value: float, shown: str) -> None:
    """Enough to compare, not more than a measurement knows."""
    assert number(value) == shown


def test_spread_shows_median_and_range() -> None:
    """One value stands alone; none is a dash."""
    assert spread([3.0, 1.0, 2.0]) == "2.00 (1.00–3.00)"
    assert spread([2.0]) == "2.00"
    assert spread([]) == "–"


def test_ratios_are_taken_within_a_round() -> None:
    """A machine that slows down for a whole round changes no ratio."""
    assert ratios([10.0, 5.0], [5.0, 2.5]) == [2.0, 2.0]


def test_table_is_markdown() -> None:
    """Names to the left, numbers to the right."""
    assert table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_operations_of_a_text() -> None:
    """21 million operations a token in the linear layers of the bundled model."""
    assert Model.bundled().flops(1) == pytest.approx(21.2e6, rel=0.01)


def test_agreement_is_the_cosine_to_the_reference() -> None:
    """Length does not matter, direction does; a missing vector is an error."""
    reference = Reference(["a", "b"], np.eye(2, dtype=np.float32))
    same = [np.array([2, 0], dtype=np.float32), np.array([1, 1], dtype=np.float32)]
    found = reference.compare([same], "it")
    assert found.min_cosine == pytest.approx(2**-0.5)
    with pytest.raises(RuntimeError, match="it gave vectors of shape"):
        reference.compare([same[:1]], "it")


def test_usage_follows_a_process_and_its_children() -> None:
    """Memory and CPU time of a process that was started belong to the tree that started it."""
    before = usage(os.getpid())
    work = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ninput()"
    with subprocess.Popen(
        [sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert child.pid in process_tree(os.getpid())
        assert 0 < resident_mib(child.pid) < resident_mib(os.getpid())
        assert usage(os.getpid()).since(before).tree_s >= 0.25
        child.communicate(b"\n")
