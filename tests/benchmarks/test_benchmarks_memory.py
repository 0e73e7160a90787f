"""The shapes that memory is measured with."""

from __future__ import annotations

from benchmarks.memory import shapes


def test_shapes_are_many_and_all_different() -> None:
    """No batch comes twice, none is cut into parts, and the longest and the shortest texts are among them."""
    drawn = shapes(3600)
    assert len(set(drawn)) == 3600
    assert max(rows * length for rows, length in drawn) <= 2048
    lengths = {length for _, length in drawn}
    assert {1, 13, 64, 72, 256} <= lengths
    assert not lengths & {65, 70, 250, 255}, "they are rounded up: not a shape of their own"
    assert max(rows for rows, _ in drawn) > 1000


def test_shapes_are_the_same_in_each_run() -> None:
    """Figures of two runs can be compared."""
    assert shapes(50) == shapes(50) != shapes(50, seed=2)
