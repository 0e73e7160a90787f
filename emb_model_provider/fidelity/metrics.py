"""Measures of how close two sets of results are: vectors, scores, sparse vectors, and vectors of tokens.

Nothing here knows a model. All functions take the results to measure first, and those at fp32 second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from emb_model_provider.backends.similarity import maxsim

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from numpy.typing import ArrayLike, NDArray

    from emb_model_provider.backends.base import SparseVector

NEIGHBORS = 10
TOP_TERMS = 32
"""Number of terms with the highest weights that are compared."""
_MIN_SPREAD = 0.1
"""Logits that differ by less are practically equal, so differences are not compared with a smaller spread."""
_EQUAL = 1e-4
"""Difference of a logit, relative to that spread, that does not count for the ranking."""
_SMALLEST = 1e-30
"""Keeps divisions by the norm of a zero vector finite."""

# --- dense vectors ------------------------------------------------------------------------------------


def cosines(ours: ArrayLike, theirs: ArrayLike) -> NDArray[np.float64]:
    """Return the cosine of each row of `ours` to the same row of `theirs`: float64 of shape (rows,).

    A zero vector has no direction, so if a row of `theirs` is zero, the result is 1 if that of `ours` is zero, else 0.
    """
    left, right = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    our_norms, their_norms = np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1)
    products = (left * right).sum(axis=1) / np.maximum(our_norms * their_norms, _SMALLEST)
    result: NDArray[np.float64] = np.where(their_norms > 0, products, (our_norms == 0).astype(np.float64))
    return result


def similarities(vectors: ArrayLike) -> NDArray[np.float64]:
    """Return the cosines of all pairs of rows: float64 of shape (rows, rows)."""
    rows = np.asarray(vectors, dtype=np.float64)
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _SMALLEST)
    result: NDArray[np.float64] = unit @ unit.T
    return result


def neighbor_overlap(ours: NDArray[np.float64], theirs: NDArray[np.float64], count: int = NEIGHBORS) -> float | None:
    """Return the mean share of each text's `count` nearest neighbors in `theirs` that are also nearest in `ours`.

    Both are `similarities`. A text is not its own neighbor, and of equally near texts the first ones count. With fewer
    other texts, all of them are neighbors; without any, the result is None.
    """
    texts = len(ours)
    count = min(count, texts - 1)
    if count < 1:
        return None
    kept = _nearest(ours, count) & _nearest(theirs, count)
    return float(kept.sum() / (count * texts))


def spearman(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float | None:
    """Return Spearman's rank correlation of the similarities of all pairs of different texts, -1 to 1.

    It is None if it is undefined, because there are fewer than three texts or all pairs are equally similar.
    """
    if len(ours) < 3:
        return None
    pairs = np.triu_indices(len(ours), k=1)
    return rank_correlation(ours[pairs], theirs[pairs])


def rank_correlation(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float | None:
    """Return Spearman's rank correlation of two rows of values; None if all values of one of them are equal."""
    left, right = _ranks(ours), _ranks(theirs)
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


# --- scores -------------------------------------------------------------------------------------------


def score_differences(
    ours: NDArray[np.float32], theirs: NDArray[np.float32], groups: Sequence[Hashable]
) -> tuple[float, float, float]:
    """Compare logits of shape (inputs, labels), within the inputs of each group, such as the documents of a query.

    Returns:
        The largest difference; the largest one relative to the spread of the logits of its group and label; and the
        lowest rank correlation of a group and label.
    """
    rows: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        rows.setdefault(group, []).append(row)
    largest, relative, correlation = 0.0, 0.0, 1.0
    for members in rows.values():
        for label in range(ours.shape[1]):
            left, right = (side[members, label].astype(np.float64) for side in (ours, theirs))
            difference = float(np.abs(left - right).max())
            spread = max(float(right.max() - right.min()), _MIN_SPREAD)
            largest, relative = max(largest, difference), max(relative, difference / spread)
            # Documents with equal tokens have equal scores but for rounding, which is no order.
            left = np.where(np.abs(left - right) <= _EQUAL * spread, right, left)
            if len(members) >= NEIGHBORS and (ranked := rank_correlation(left, right)) is not None:
                correlation = min(correlation, ranked)
    return largest, relative, correlation


# --- sparse vectors -----------------------------------------------------------------------------------


def term_overlaps(ours: Sequence[SparseVector], theirs: Sequence[SparseVector]) -> list[float]:
    """Return, for each text, the share of the `TOP_TERMS` strongest terms of `theirs` that are strongest in `ours`, too."""
    shares = []
    for left, right in zip(ours, theirs, strict=True):
        expected = set(right.largest(TOP_TERMS).indices.tolist())
        found = set(left.largest(len(expected)).indices.tolist()) if expected else set(left.indices.tolist())
        shares.append(len(expected & found) / len(expected) if expected else float(not found))
    return shares


def dot_product_error(ours: Sequence[SparseVector], theirs: Sequence[SparseVector]) -> float:
    """Return the largest error of a dot product of two texts, relative to the product of the lengths of their vectors."""
    terms = np.unique(np.concatenate([vector.indices for vector in (*ours, *theirs)]))
    left, right = (_densify(side, terms) for side in (ours, theirs))
    lengths = np.maximum(np.linalg.norm(right, axis=1), _SMALLEST)
    errors = np.abs(left @ left.T - right @ right.T) / np.outer(lengths, lengths)
    # Texts without any term have no length to compare with.
    return float(errors[np.ix_(lengths > _SMALLEST, lengths > _SMALLEST)].max(initial=0.0))


def _densify(vectors: Sequence[SparseVector], terms: NDArray[np.int32]) -> NDArray[np.float64]:
    """Return the weights of some terms: float64 of shape (texts, terms)."""
    dense = np.zeros((len(vectors), len(terms)))
    for row, vector in enumerate(vectors):
        dense[row, np.searchsorted(terms, vector.indices)] = vector.values
    return dense


# --- vectors of tokens --------------------------------------------------------------------------------


def maxsim_error(ours: Sequence[NDArray[np.float32]], theirs: Sequence[NDArray[np.float32]], queries: int) -> float:
    """Return the largest difference of a MaxSim score, relative to that of the query with itself.

    The first `queries` texts are compared with all of them.
    """
    largest = 0.0
    for row in range(min(queries, len(ours))):
        own = max(maxsim(theirs[row], theirs[row]), _SMALLEST)
        for other in range(len(ours)):
            difference = abs(maxsim(ours[row], ours[other]) - maxsim(theirs[row], theirs[other]))
            largest = max(largest, difference / own)
    return largest
