"""Batches are split into micro-batches within their limits, at the lowest cost."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emb_model_provider.backends.openvino_cpu.backend import (
    MICRO_BATCH_COST,
    MICRO_BATCH_ROWS,
    MICRO_BATCH_TOKENS,
    bucket_length,
    split_batch,
)

LENGTHS = st.lists(st.integers(1, 600), min_size=1, max_size=120)


@given(LENGTHS)
def test_each_row_is_in_one_micro_batch_and_fits(lengths: list[int]) -> None:
    split = list(split_batch(lengths, 512 if max(lengths) <= 512 else 600))
    assert sorted(row for rows, _ in split for row in rows) == list(range(len(lengths)))
    assert all(max(lengths[row] for row in rows) <= length for rows, length in split)


@given(LENGTHS)
def test_micro_batches_are_within_their_limits(lengths: list[int]) -> None:
    """Except for a single row that is longer than the limit. The longest rows come first."""
    split = list(split_batch(lengths, 600))
    assert all(len(rows) == 1 or len(rows) * length <= MICRO_BATCH_TOKENS for rows, length in split)
    assert all(len(rows) <= MICRO_BATCH_ROWS for rows, _ in split)
    assert all(a >= b for (_, a), (_, b) in pairwise(split))


@given(st.lists(st.integers(1, 90), min_size=1, max_size=9))
def test_no_other_split_costs_less(lengths: list[int]) -> None:
    """Compared with all ways to split the sorted rows."""

    def cost(split: list[tuple[int, int]]) -> int:
        return sum(rows * length + MICRO_BATCH_COST for rows, length in split)

    ordered = sorted(lengths, reverse=True)
    splits = []
    for choice in range(2 ** (len(ordered) - 1)):
        ends = [i + 1 for i in range(len(ordered) - 1) if choice >> i & 1] + [len(ordered)]
        starts = [0, *ends[:-1]]
        splits.append([(b - a, bucket_length(ordered[a], 90)) for a, b in zip(starts, ends, strict=True)])
    assert cost([(len(rows), length) for rows, length in split_batch(lengths, 90)]) == min(map(cost, splits))


@pytest.mark.parametrize(
    ("length", "longest", "expected"), [(13, 256, 13), (64, 256, 64), (65, 256, 72), (250, 254, 254), (300, 256, 300)]
)
def test_lengths_above_64_are_rounded_up(length: int, longest: int, expected: int) -> None:
    """But not beyond the maximum length of the model."""
    assert bucket_length(length, longest) == expected
