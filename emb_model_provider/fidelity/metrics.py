"""Measures of how close two sets of vectors are. Imports numpy only."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

NEIGHBORS = 10
_SMALLEST = 1e-30
"""Keeps divisions by the norm of a zero vector finite."""


def cosines(ours: ArrayLike, theirs: ArrayLike) -> NDArray[np.float64]:
    """Return the cosine of each row of `ours` to the same row of `theirs`.

    A zero vector has no direction, so if a row of `theirs` is zero, the result is 1 if that of `ours` is zero, else 0.

    Args:
        ours: Shape (texts, dimension).
        theirs: Shape (texts, dimension).

    Returns:
        float64 of shape (texts,).
    """
    left, right = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    our_norms, their_norms = np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1)
    products = (left * right).sum(axis=1) / np.maximum(our_norms * their_norms, _SMALLEST)
    result: NDArray[np.float64] = np.where(their_norms > 0, products, (our_norms == 0).astype(np.float64))
    return result


def similarities(vectors: ArrayLike) -> NDArray[np.float64]:
    """Return the cosines of all pairs of rows: float64 of shape (texts, texts)."""
    rows = np.asarray(vectors, dtype=np.float64)
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _SMALLEST)
    result: NDArray[np.float64] = unit @ unit.T
    return result


def neighbor_overlap(ours: NDArray[np.float64], theirs: NDArray[np.float64], count: int = NEIGHBORS) -> float | None:
    """Return the mean share of each text's nearest neighbors in `theirs` that are also nearest in `ours`.

    A text is not its own neighbor, and of equally near texts the first ones count.

    Args:
        ours: Similarities of shape (texts, texts).
        theirs: Similarities of shape (texts, texts).
        count: Number of neighbors. With fewer other texts, all of them are neighbors.

    Returns:
        0 to 1, or None if there are no other texts.
    """
    texts = len(ours)
    count = min(count, texts - 1)
    if count < 1:
        return None
    kept = _nearest(ours, count) & _nearest(theirs, count)
    return float(kept.sum() / (count * texts))


def spearman(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float | None:
    """Return Spearman's rank correlation of the similarities of all pairs of different texts.

    Args:
        ours: Similarities of shape (texts, texts).
        theirs: Similarities of shape (texts, texts).

    Returns:
        -1 to 1, or None if it is undefined, because there are fewer than three texts or all pairs are equally similar.
    """
    if len(ours) < 3:
        return None
    pairs = np.triu_indices(len(ours), k=1)
    left, right = _ranks(ours[pairs]), _ranks(theirs[pairs])
    left, right = left - left.mean(), right - right.mean()
    scale = float(np.sqrt((left @ left) * (right @ right)))
    return float(left @ right) / scale if scale > 0 else None


def _nearest(similar: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Return which texts are among the nearest of each text: bool of shape (texts, texts)."""
    others = similar.copy()
    np.fill_diagonal(others, -np.inf)
    order = np.argsort(-others, axis=1, kind="stable")[:, :count]
    nearest = np.zeros(similar.shape, dtype=np.bool_)
    np.put_along_axis(nearest, order, values=True, axis=1)
    return nearest


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rank of each value, from 1; equal values share the mean of their ranks."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: NDArray[np.float64] = last - (counts - 1) / 2
    return mean[places.reshape(-1)]
