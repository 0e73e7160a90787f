"""How similar a query and a document are, by their sparse vectors or the vectors of their tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from emb_model_provider.backends.base import SparseVector


def maxsim(query: NDArray[np.float32], document: NDArray[np.float32]) -> float:
    """Return the sum, over the tokens of a query, of the highest dot product with a token of a document."""
    if not len(query) or not len(document):
        return 0.0
    return float((query.astype(np.float64) @ document.astype(np.float64).T).max(axis=1).sum())


def sparse_dot(one: SparseVector, other: SparseVector) -> float:
    """Return the dot product of two sparse vectors."""
    _, places, other_places = np.intersect1d(one.indices, other.indices, assume_unique=True, return_indices=True)
    return float(one.values[places].astype(np.float64) @ other.values[other_places].astype(np.float64))
