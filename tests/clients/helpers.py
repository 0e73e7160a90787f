"""Texts, keys and comparisons for the tests of SDKs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pytest

if TYPE_CHECKING:
    from numpy.typing import NDArray

IGNORE_WARNINGS = pytest.mark.filterwarnings("ignore")
"""The SDKs use deprecated functions of other packages, and leave connections open."""
KEY = "sk-clients-0123456789"
QUERY, DOCUMENT = "query: ", "passage: "
"""Prompts of the model."""
TEXTS = ["a cat sits on the mat", "向量数据库", "Ein Hund läuft.", "x " * 400]


class Reference(Protocol):
    """Embeds texts with sentence-transformers."""

    def __call__(self, *texts: str, prompt: str = "") -> NDArray[np.float32]:
        """Return float32 vectors of shape (texts, 384)."""
        ...


def assert_vectors(actual: Any, expected: NDArray[np.float32]) -> None:
    """Check vectors by value. Both sides compute in fp32, with different kernels."""
    np.testing.assert_allclose(np.array(actual, dtype=np.float32), expected, atol=1e-5)
