"""Charts as SVG, drawn on the server: the geometry of lines and of heat maps. Templates write the elements."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH, HEIGHT = 600, 140
"""Size of the area in which the lines are, in units of the SVG."""
SHADES = 10
"""The colors of a heat map are classes from 0 to this number, because the policy of the pages forbids inline styles."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart."""

    points: str
    """Pairs of coordinates, as the attribute `points` of a polyline. Gaps are skipped."""
    area: str
    """The same with the corners of the area below the line."""


@dataclass(frozen=True, slots=True)
class LineChart:
    """Lines over the same points in time, the latest at the right."""

    lines: Sequence[Line]
    top: float
    """The value at the upper edge. The lower edge is 0."""
    width: int = WIDTH
    height: int = HEIGHT


def line_chart(*series: Sequence[float | None]) -> LineChart:
    """Return a chart of values that are not negative; None is a gap."""
    top = _round_up(max((value for values in series for value in values if value is not None), default=0.0))
    return LineChart(lines=[_line(values, top) for values in series], top=top)


def shade(cosine: float) -> int:
    """Return the color of a cosine, 0 (0 or less) to `SHADES` (1)."""
    return round(min(1.0, max(0.0, cosine)) * SHADES)


def _line(values: Sequence[float | None], top: float) -> Line:
    step = WIDTH / max(1, len(values) - 1)
    points = [
        (round(index * step, 1), round(HEIGHT - HEIGHT * value / top, 1))
        for index, value in enumerate(values)
        if value is not None
    ]
    text = " ".join(f"{x:g},{y:g}" for x, y in points)
    area = f"{points[0][0]:g},{HEIGHT} {text} {points[-1][0]:g},{HEIGHT}" if points else ""
    return Line(text, area)


def _round_up(value: float) -> float:
    """Return the next of 1, 2, 5, 10, 20, ... times a power of ten; 1 for 0."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if value <= factor * power * (1 + 1e-9))
