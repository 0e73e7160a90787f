"""The shapes of the batches with which memory is measured."""

from __future__ import annotations

from benchmarks.memory import draw_shapes


def test_shapes_are_different_and_not_changed_by_the_backend() -> None:
    """No batch is repeated, split or rounded up, and the shapes include the longest and the shortest texts."""
    shapes = draw_shapes(3600)
    assert len(set(shapes)) == 3600
    assert max(rows * length for rows, length in shapes) <= 2048
    lengths = {length for _, length in shapes}
    assert {1, 13, 64, 72, 256} <= lengths
    assert not lengths & {65, 70, 250, 255}, "the backend rounds these up"
    assert max(rows for rows, _ in shapes) > 1000


def test_shapes_are_the_same_in_each_run() -> None:
    """The results of two runs can be compared."""
    assert draw_shapes(50) == draw_shapes(50) != draw_shapes(50, seed=2)
