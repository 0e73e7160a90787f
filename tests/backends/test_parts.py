"""A batch cut into parts: every row once, nothing beyond the limits, and no cheaper way to cut it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emb_model_provider.backends.openvino_cpu import backend as module
from emb_model_provider.backends.openvino_cpu.backend import MICRO_BATCH_TOKENS, bucket_length, split_batch

LENGTHS = st.lists(st.integers(1, 600), min_size=1, max_size=120)


@given(LENGTHS)
def test_every_row_is_in_one_part_and_fits_into_it(lengths: list[int]) -> None:
    """No row is lost or run twice, and none is cut."""
    cut = list(split_batch(lengths, 512 if max(lengths) <= 512 else 600))
    assert sorted(row for rows, _ in cut for row in rows) == list(range(len(lengths)))
    assert all(max(lengths[row] for row in rows) <= length for rows, length in cut)


@given(LENGTHS)
def test_a_part_is_within_its_limits(lengths: list[int]) -> None:
    """Padded tokens are bounded, but for a single row that is longer by itself; the longest rows run first."""
    cut = list(split_batch(lengths, 600))
    assert all(len(rows) == 1 or len(rows) * length <= MICRO_BATCH_TOKENS for rows, length in cut)
    assert all(len(rows) <= module._MICRO_BATCH_ROWS for rows, _ in cut)
    assert all(a >= b for (_, a), (_, b) in pairwise(cut))


@given(st.lists(st.integers(1, 90), min_size=1, max_size=9))
def test_no_cut_costs_less(lengths: list[int]) -> None:
    """Compared with every way there is to cut the sorted rows."""

    def cost(cut: list[tuple[int, int]]) -> int:
        return sum(rows * length + module._MICRO_BATCH_COST for rows, length in cut)

    ordered = sorted(lengths, reverse=True)
    ways = []
    for choice in range(2 ** (len(ordered) - 1)):
        ends = [i + 1 for i in range(len(ordered) - 1) if choice >> i & 1] + [len(ordered)]
        starts = [0, *ends[:-1]]
        ways.append([(b - a, bucket_length(ordered[a], 90)) for a, b in zip(starts, ends, strict=True)])
    assert cost([(len(rows), length) for rows, length in split_batch(lengths, 90)]) == min(map(cost, ways))


@pytest.mark.parametrize(
    ("length", "longest", "expected"),
    [(13, 256, 13), (64, 256, 64), (65, 256, 72), (250, 254, 254), (300, 256, 300)],
)
def test_lengths_are_rounded_beyond_64(length: int, longest: int, expected: int) -> None:
    """Long rows share shapes, and are never padded beyond what the model reads."""
    assert bucket_length(length, longest) == expected
