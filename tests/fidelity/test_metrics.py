"""Cosines, neighbor overlap, rank correlation, and the measures of scores, sparse vectors and token vectors."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy.stats import spearmanr

from emb_model_provider.backends.base import MultiVectorFidelity, ScoreFidelity, SparseFidelity, SparseVector
from emb_model_provider.fidelity.metrics import (
    NEIGHBORS,
    TOP_TERMS,
    cosines,
    dot_product_error,
    maxsim,
    maxsim_error,
    neighbor_overlap,
    rank_correlation,
    score_differences,
    similarities,
    spearman,
    term_overlaps,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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


def test_rank_correlation_of_values() -> None:
    """One swap of three values is 1 - 6 * 2 / (3 * 8). Equal values share a rank."""
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([10.0, 30, 20])) == pytest.approx(0.5)
    ours, theirs = np.array([1.0, 1, 2, 3]), np.array([4.0, 5, 5, 6])
    assert rank_correlation(ours, theirs) == pytest.approx(spearmanr(ours, theirs).statistic)
    assert rank_correlation(np.ones(3), np.array([1.0, 2, 3])) is None
    assert rank_correlation(np.array([1.0]), np.array([2.0])) is None


# --- scores -----------------------------------------------------------------------------------------------------


def differences(
    ours: Sequence[float], theirs: Sequence[float], groups: Sequence[str] | None = None
) -> tuple[float, float, float]:
    """Return the differences of logits of one label, by default of one query."""
    sides = [np.array(side, dtype=np.float32)[:, np.newaxis] for side in (ours, theirs)]
    return score_differences(*sides, groups or ["query"] * len(ours))


def test_differences_of_scores() -> None:
    """The two best of ten documents change places: the spread is 9, and the correlation 1 - 6 * 2 / (10 * 99)."""
    theirs = list(map(float, range(10)))
    assert differences([*theirs[:8], 9, 8], theirs) == pytest.approx((1, 1 / 9, 1 - 12 / 990))
    assert differences(theirs, theirs) == (0, 0, 1)


def test_differences_are_relative_to_the_scores_of_the_same_query() -> None:
    """0.5 is much for a query whose scores are within 1, and little for one whose scores are within 100."""
    ours, theirs = [0, 1.5, 0, 100.5], [0.0, 1, 0, 100]
    assert differences(ours, theirs, ["a", "a", "b", "b"]) == pytest.approx((0.5, 0.5, 1))
    assert differences(ours, theirs, ["a", "a", "a", "a"]) == pytest.approx((0.5, 0.005, 1))


def test_equal_scores_have_no_order() -> None:
    """Their differences are relative to 0.1. A difference of rounding does not change the correlation either."""
    assert differences([0.52] * 12, [0.5] * 12) == pytest.approx((0.02, 0.2, 1), abs=1e-6)
    theirs = [0.0, 1e-6, *range(1, 12)]
    assert differences([1e-6, 0.0, *range(1, 12)], theirs)[2] == pytest.approx(1)


def test_few_documents_have_no_correlation() -> None:
    """A single swap would make it -1. The difference of the scores still counts."""
    assert differences([1, 0], [0, 1]) == (1, 1, 1)
    assert differences([0.05], [0.0]) == pytest.approx((0.05, 0.5, 1))


def test_each_label_is_compared() -> None:
    """Only the second one differs."""
    theirs = np.arange(20, dtype=np.float32).reshape(10, 2)
    ours = theirs.copy()
    ours[:, 1] = ours[::-1, 1]
    assert score_differences(ours, theirs, [""] * 10) == pytest.approx((18, 1, -1))


def test_agreement_of_scores() -> None:
    """It is the worse one of the correlation and of what the difference leaves."""
    assert ScoreFidelity(10, 1.0, 0.25, 0.5).agreement == 0.5
    assert ScoreFidelity(10, 1.0, 0.25, 0.875).agreement == 0.75


# --- sparse vectors ---------------------------------------------------------------------------------------------


def sparse(weights: Mapping[int, float]) -> SparseVector:
    indices = sorted(weights)
    return SparseVector(
        np.array(indices, dtype=np.int32), np.array([weights[index] for index in indices], dtype=np.float32)
    )


def test_overlap_of_terms() -> None:
    """The weakest of three terms is another one; so are all terms; and so is none, although the weights differ."""
    theirs = sparse({1: 3, 2: 2, 4: 1})
    ours = [sparse({1: 3, 2: 2, 3: 1}), sparse({5: 3, 6: 2, 7: 1}), sparse({1: 1, 2: 2, 4: 3})]
    assert term_overlaps(ours, [theirs] * 3) == pytest.approx([2 / 3, 0, 1])


def test_only_the_strongest_terms_are_compared() -> None:
    """A lost weak term costs nothing, and a lost strong one its share."""
    weights = {index: 100.0 - index for index in range(TOP_TERMS + 8)}
    theirs = sparse(weights)
    weak = sparse({index: weight for index, weight in weights.items() if index < TOP_TERMS})
    strong = sparse({index: weight for index, weight in weights.items() if index > 0})
    assert term_overlaps([weak, strong], [theirs] * 2) == [1, (TOP_TERMS - 1) / TOP_TERMS]


def test_a_text_without_terms_equals_only_another_one() -> None:
    empty, some = sparse({}), sparse({3: 1})
    assert term_overlaps([empty, some, empty], [empty, empty, some]) == [1, 0, 0]


def test_error_of_dot_products() -> None:
    """(3, 4) is measured as (3, 4.5): 29.25 instead of 25 with itself, and 9 instead of 8 with (0, 2)."""
    theirs = [sparse({1: 3, 2: 4}), sparse({2: 2})]
    assert dot_product_error([sparse({1: 3, 2: 4.5}), theirs[1]], theirs) == pytest.approx(4.25 / 25)
    assert dot_product_error([sparse({1: 3, 2: 4, 9: 0.1}), sparse({2: 2, 9: 1})], theirs) == pytest.approx(1 / 4)
    assert dot_product_error(theirs, theirs) == 0
    assert dot_product_error(theirs[:1], theirs[:1]) == 0


def test_texts_without_terms_have_no_error() -> None:
    """They have no length to which an error could be relative; their overlap counts instead."""
    some, empty = sparse({1: 3}), sparse({})
    assert dot_product_error([empty], [empty]) == 0
    assert dot_product_error([some, sparse({1: 5})], [some, empty]) == 0


def test_agreement_of_sparse_vectors() -> None:
    assert SparseFidelity(1, term_overlap=0.5, score_error=0.25).agreement == 0.5
    assert SparseFidelity(1, term_overlap=0.875, score_error=0.25).agreement == 0.75


# --- vectors of tokens ------------------------------------------------------------------------------------------


def tokens(*rows: Sequence[float]) -> NDArray[np.float32]:
    return np.array(rows, dtype=np.float32).reshape(-1, 2)


QUERY, DOCUMENT = tokens((1, 0), (0, 1)), tokens((0.6, 0.8), (1, 0))


def test_maxsim_is_the_sum_of_the_best_products() -> None:
    """1 for the first token of the query, and 0.8 for the second one."""
    assert maxsim(QUERY, DOCUMENT) == pytest.approx(1.8)
    assert maxsim(DOCUMENT, QUERY) == pytest.approx(0.8 + 1)
    assert maxsim(QUERY, tokens()) == maxsim(tokens(), QUERY) == 0


def test_error_of_maxsim() -> None:
    """The document loses 0.2 of its 1.8 with the query, whose score with itself is 2."""
    other = tokens((0.6, 0.6), (1, 0))
    assert maxsim_error([QUERY, other], [QUERY, DOCUMENT], queries=1) == pytest.approx(0.1)
    # as a query, the document has 1.72 instead of 2 with itself
    assert maxsim_error([QUERY, other], [QUERY, DOCUMENT], queries=2) == pytest.approx(0.14)
    assert maxsim_error([QUERY], [QUERY], queries=8) == 0


def test_texts_without_tokens_have_no_maxsim_error() -> None:
    """Such as a text of which all tokens are skipped."""
    assert maxsim_error([tokens(), QUERY], [tokens(), QUERY], queries=2) == 0
    assert MultiVectorFidelity(2, min_cosine=0.5, maxsim_error=0.25).agreement == 0.75
