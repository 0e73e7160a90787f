"""The number of operations of a text."""

from __future__ import annotations

import pytest

from benchmarks.engine import Model


def test_operations_of_a_text() -> None:
    """The linear layers of the bundled model need 21 million operations per token."""
    assert Model.bundled().flops(1) == pytest.approx(21.2e6, rel=0.01)
