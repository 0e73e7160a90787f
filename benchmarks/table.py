"""Markdown tables, and medians over rounds."""

from __future__ import annotations

import math
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

NONE = "–"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; all columns but the first are aligned right."""
    lines = [_row(head), _row(["---", *["---:"] * (len(head) - 1)]), *map(_row, rows)]
    return "\n".join(lines)


def number(value: float) -> str:
    """Return a number with three significant digits, or as a whole one from 100 on."""
    if not math.isfinite(value):
        return NONE
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def spread(values: Sequence[float]) -> str:
    """Return the median of several rounds, and their range where there is more than one."""
    if not values:
        return NONE
    middle = number(median(values))
    return middle if len(values) == 1 else f"{middle} ({number(min(values))}–{number(max(values))})"


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Return the ratio of each round: what drifts between rounds cancels out."""
    return [a / b for a, b in zip(over, under, strict=True) if b]


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
