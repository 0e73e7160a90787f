"""Cosines, neighbor overlap and rank correlation equal naive computations."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy.stats import spearmanr

from emb_model_provider.fidelity.metrics import NEIGHBORS, cosines, neighbor_overlap, similarities, spearman

if TYPE_CHECKING:
    from numpy.typing import NDArray


def some_vectors(texts: int = 40, dimension: int = 6, *, seed: int = 1) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(texts, dimension))


def line(*positions: float) -> NDArray[np.float64]:
    """Return similarities of texts on a line: the closer they are, the more similar."""
    similar: NDArray[np.float64] = -np.abs(np.subtract.outer(positions, positions)).astype(np.float64)
    return similar


# --- cosines ----------------------------------------------------------------------------------------------------


def test_cosines_depend_on_the_direction_only() -> None:
    """1 for the same direction, 0 for a right angle, -1 for the opposite, √½ for 45 degrees."""
    ours = [[3, 0], [0, 2], [-1, 0], [1, 1], [3, 4]]
    theirs = [[1, 0], [5, 0], [7, 0], [4, 0], [4, 3]]
    assert cosines(ours, theirs) == pytest.approx([1, 0, -1, 0.5**0.5, 24 / 25])


def test_a_zero_vector_equals_only_a_zero_vector() -> None:
    """The cosine of two zero vectors is 1, and of a zero vector to another one 0."""
    assert cosines([[0, 0], [1, 0], [0, 0]], [[0, 0], [0, 0], [1, 0]]).tolist() == [1, 0, 0]


def test_cosines_are_computed_in_double_precision() -> None:
    """Squares of the values would overflow float16."""
    vectors = np.full((1, 8), 60_000, dtype=np.float16)
    assert cosines(vectors, vectors) == pytest.approx([1], abs=1e-12)


def test_similarities_are_the_cosines_of_all_pairs() -> None:
    """A zero row has similarity 0 to all rows."""
    rows = np.vstack([some_vectors(5), np.zeros(6)])
    for i, j in np.ndindex(5, 5):
        expected = rows[i] @ rows[j] / (np.linalg.norm(rows[i]) * np.linalg.norm(rows[j]))
        assert similarities(rows)[i, j] == pytest.approx(expected)
    assert not similarities(rows)[5].any()


# --- neighbors -------------------------------------------------------------------------------------------------


def naive_overlap(ours: NDArray[np.float64], theirs: NDArray[np.float64], count: int) -> float:
    shares = []
    for text in range(len(ours)):
        others = [other for other in range(len(ours)) if other != text]
        nearest = [set(sorted(others, key=lambda other: -side[text, other])[:count]) for side in (ours, theirs)]
        shares.append(len(nearest[0] & nearest[1]) / count)
    return float(np.mean(shares))


def test_overlap_of_four_texts() -> None:
    """The last of four texts on a line moves to the front, so three of four keep their nearest neighbor."""
    before, after = line(0, 1, 3, 7), line(0, 1, 3, -1.5)
    # nearest before: 1, 0, 1, 2; after: 1, 0, 1, 0
    assert neighbor_overlap(before, after, 1) == 3 / 4
    # the two nearest before: 12, 02, 10, 21; after: 13, 02, 10, 01
    assert neighbor_overlap(before, after, 2) == (1 + 2 + 2 + 1) / 8


@pytest.mark.parametrize("count", [1, 3, NEIGHBORS, 39])
def test_overlap_equals_a_naive_computation(count: int) -> None:
    """Of random vectors with noise."""
    vectors = some_vectors()
    ours, theirs = similarities(vectors), similarities(vectors + some_vectors(seed=2) / 3)
    assert neighbor_overlap(ours, theirs, count) == pytest.approx(naive_overlap(ours, theirs, count))


def test_all_measures_of_identical_vectors_are_1() -> None:
    vectors = some_vectors()
    same = similarities(vectors)
    assert cosines(vectors, vectors) == pytest.approx(np.ones(40))
    assert neighbor_overlap(same, same) == 1
    assert spearman(same, same) == pytest.approx(1)


def test_shuffled_vectors_lose_their_neighbors() -> None:
    """Overlap and correlation are about those of chance."""
    vectors = some_vectors(200)
    ours, theirs = similarities(vectors[np.random.default_rng(3).permutation(200)]), similarities(vectors)
    overlap, correlation = neighbor_overlap(ours, theirs), spearman(ours, theirs)
    assert overlap is not None
    assert correlation is not None
    assert overlap < 0.15
    assert abs(correlation) < 0.1


def test_of_equally_near_texts_the_first_are_neighbors() -> None:
    """Texts that are all alike have the same neighbors on both sides."""
    alike = np.ones((30, 30))
    assert neighbor_overlap(alike, alike) == 1


def test_few_texts_have_all_others_as_neighbors() -> None:
    """With ten other texts, none can be lost. Without other texts there is no overlap."""
    ours, theirs = (similarities(some_vectors(NEIGHBORS + 1)), similarities(some_vectors(NEIGHBORS + 1, seed=4)))
    assert neighbor_overlap(ours, theirs) == 1
    assert neighbor_overlap(ours[:1, :1], theirs[:1, :1]) is None


def test_a_text_is_not_its_own_neighbor() -> None:
    """Otherwise every overlap would be too high."""
    before, after = line(0, 1, 3), line(0, 1, -0.5)
    assert neighbor_overlap(before, after, 1) == naive_overlap(before, after, 1) == 1 / 3


# --- ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decimals", [1, 12])
def test_correlation_equals_that_of_scipy(decimals: int) -> None:
    """With many equal similarities, and with none."""
    vectors = some_vectors()
    ours = similarities(vectors).round(decimals)
    theirs = similarities(vectors + some_vectors(seed=5)).round(decimals)
    pairs = list(combinations(range(40), 2))
    expected = spearmanr([ours[pair] for pair in pairs], [theirs[pair] for pair in pairs]).statistic
    assert spearman(ours, theirs) == pytest.approx(expected)


def test_correlation_of_reversed_ranks_is_minus_1() -> None:
    """Only the order counts."""
    near = line(0, 1, 3, 7)
    assert spearman(near, near**3) == pytest.approx(1)
    assert spearman(near, -near) == pytest.approx(-1)


def test_correlation_without_order_is_none() -> None:
    """Two texts have only one pair, and equal similarities have no order."""
    assert spearman(line(0, 1), line(0, 1)) is None
    assert spearman(np.ones((5, 5)), line(0, 1, 3, 7, 9)) is None
