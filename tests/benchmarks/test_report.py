"""Numbers, tables and the description of a run."""

from __future__ import annotations

import sys

import pytest

from benchmarks.report import describe_run, format_counts, format_number, format_spread, markdown_table, ratios


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1,234"), (99.94, "99.9"), (2.5, "2.50"), (0.0123, "0.0123"), (0.0, "0"), (float("nan"), "–")],
)
def test_numbers_have_three_significant_digits(value: float, text: str) -> None:
    """Numbers from 100 on are integers."""
    assert format_number(value) == text


def test_spread_is_median_and_range() -> None:
    """A single value has no range, and no value is a dash."""
    assert format_spread([3.0, 1.0, 2.0]) == "2.00 (1.00–3.00)"
    assert format_spread([2.0]) == "2.00"
    assert format_spread([]) == "–"


def test_counts_begin_with_the_largest() -> None:
    """No count is a zero."""
    assert format_counts({"timeout": 1, "503": 12}) == "12 503, 1 timeout"
    assert format_counts({}) == "0"


def test_ratios_are_taken_within_rounds() -> None:
    """A machine that is slower for a whole round does not change a ratio."""
    assert ratios([10.0, 5.0], [5.0, 2.5]) == [2.0, 2.0]


def test_table_is_markdown() -> None:
    """All columns except the first are aligned right."""
    assert markdown_table(["a", "b"], [["x", "1"]]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


def test_description_of_a_run_has_no_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Options whose values are paths of this machine are removed from the command."""
    monkeypatch.setattr(sys, "argv", ["serve", "--directory", "/secret/a", "--rounds", "2", "--json=/secret/b"])
    description = describe_run("benchmarks.serve", ["a note"])
    assert "- Command: `uv run python -m benchmarks.serve --rounds 2`" in description
    assert "/secret" not in description
    assert description.endswith("\n- a note")
