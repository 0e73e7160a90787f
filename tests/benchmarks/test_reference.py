"""Comparison of vectors with the reference."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.reference import Reference


def test_agreement_is_the_cosine_to_the_reference() -> None:
    """The length of a vector does not matter."""
    reference = Reference(["a", "b"], np.eye(2, dtype=np.float32))
    vectors = [np.array([2, 0], dtype=np.float32), np.array([1, 1], dtype=np.float32)]
    agreement = reference.compare([vectors], "server")
    assert agreement.min_cosine == pytest.approx(2**-0.5)
    assert agreement.mean_cosine == pytest.approx((1 + 2**-0.5) / 2)
    with pytest.raises(RuntimeError, match="server returned vectors of shape"):
        reference.compare([vectors[:1]], "server")
