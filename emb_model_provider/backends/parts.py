"""How a batch is cut into the parts that are run: alike in length, so that little of the work is padding."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

PART_TOKENS = 2048
"""Padded tokens of a part at most: no slower than larger parts, and a fraction of their memory."""
_PART_ROWS = 64
"""Rows of a part at most: from 32 on, more of them answer no more texts a second."""
_PART_COST = 24
"""What it costs to run one more part, in padded tokens."""
_EXACT_LENGTHS = 64
_LENGTH_STEP = 8


def parts(lengths: Sequence[int], longest: int) -> Iterator[tuple[list[int], int]]:
    """Yield the rows of each part and the length that they are padded to, the longest rows first.

    `lengths` are the tokens of each row and `longest` the most that the model reads. The parts are those that
    cost least in all: their padded tokens and their number are weighed against each other.
    """
    rows = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    padded = [rounded(lengths[row], longest) for row in rows]
    sizes = _sizes(padded)
    start = 0
    while start < len(rows):
        yield rows[start : start + sizes[start]], padded[start]
        start += sizes[start]


def rounded(length: int, longest: int) -> int:
    """Return the length that a part is padded to, so that there are not too many shapes."""
    if length <= _EXACT_LENGTHS:
        return length
    return min(-(-length // _LENGTH_STEP) * _LENGTH_STEP, max(length, longest))


def _sizes(padded: Sequence[int]) -> list[int]:
    """Return, for each row, how many rows the part has that would begin with it. `padded` descends."""
    total = len(padded)
    cost = [0] * (total + 1)  # of all rows from here on
    sizes = [1] * total
    for start in range(total - 1, -1, -1):
        length = padded[start]
        most = min(total - start, _PART_ROWS, max(1, PART_TOKENS // length))
        best = cost[start + 1] + length
        for size in range(2, most + 1):
            candidate = cost[start + size] + size * length
            if candidate < best:
                best, sizes[start] = candidate, size
        cost[start] = best + _PART_COST
    return sizes
