"""Directions, neighbours and ranks are those that a naive count gives, and the corpus is fit to be counted in."""

from __future__ import annotations

import unicodedata
from collections import Counter
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import pytest
from scipy.stats import spearmanr

from emb_model_provider.fidelity.metrics import NEIGHBOURS, cosines, neighbour_overlap, similarities, spearman
from emb_model_provider.fidelity.texts import (
    CALIBRATION,
    MIN_TOPICS,
    PROBES,
    corpus,
    corpus_digest,
    long_probes,
    topics,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray


def some_vectors(texts: int = 40, dimension: int = 6, *, seed: int = 1) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(size=(texts, dimension))


def line(*cache_locations: float) -> NDArray[np.float64]:
    """Return similarities of texts that lie on a line: the nearer their places, the more alike."""
    found: NDArray[np.float64] = -np.abs(np.subtract.outer(cache_locations, cache_locations)).astype(
        np.float64
    )
    return found


# --- cosines ----------------------------------------------------------------------------------------------------


def test_cosines_are_those_worked_out_by_hand() -> None:
    """The same direction gives 1 whatever the length, a right angle 0, the opposite -1, half a right angle √½."""
    ours = [[3, 0], [0, 2], [-1, 0], [1, 1], [3, 4]]
    theirs = [[1, 0], [5, 0], [7, 0], [4, 0], [4, 3]]
    assert cosines(ours, theirs) == pytest.approx([1, 0, -1, 0.5**0.5, 24 / 25])


def test_a_zero_vector_is_true_only_to_a_zero_vector() -> None:
    """It has no direction: both zero count as 1, one of them alone as 0, and nothing is divided by nothing."""
    assert cosines([[0, 0], [1, 0], [0, 0]], [[0, 0], [0, 0], [1, 0]]).tolist() == [1, 0, 0]


def test_cosines_of_half_precision_are_not_counted_at_half_precision() -> None:
    """float16 vectors so long that the square of one overflows float16 have a cosine all the same."""
    vectors = np.full((1, 8), 60_000, dtype=np.float16)
    assert cosines(vectors, vectors) == pytest.approx([1], abs=1e-12)


def test_similarities_are_the_cosines_of_every_pair() -> None:
    """Each cell is that of two rows; a zero row is like nothing."""
    rows = np.vstack([some_vectors(5), np.zeros(6)])
    for i, j in np.ndindex(5, 5):
        expected = rows[i] @ rows[j] / (np.linalg.norm(rows[i]) * np.linalg.norm(rows[j]))
        assert similarities(rows)[i, j] == pytest.approx(expected)
    assert not similarities(rows)[5].any()


# --- neighbours -------------------------------------------------------------------------------------------------


def naive_overlap(ours: NDArray[np.float64], theirs: NDArray[np.float64], count: int) -> float:
    shares = []
    for text in range(len(ours)):
        others = [other for other in range(len(ours)) if other != text]
        nearest = [
            set(sorted(others, key=lambda other: -side[text, other])[:count]) for side in (ours, theirs)
        ]
        shares.append(len(nearest[0] & nearest[1]) / count)
    return float(np.mean(shares))


def test_neighbours_are_counted_as_by_hand() -> None:
    """Of four texts on a line, the last moves to the front: three of four keep their one nearest neighbour."""
    before, after = line(0, 1, 3, 7), line(0, 1, 3, -1.5)
    # nearest before: 1, 0, 1, 2; after: 1, 0, 1, 0
    assert neighbour_overlap(before, after, 1) == 3 / 4
    # the two nearest before: 12, 02, 10, 21; after: 13, 02, 10, 01
    assert neighbour_overlap(before, after, 2) == (1 + 2 + 2 + 1) / 8


@pytest.mark.parametrize("count", [1, 3, NEIGHBOURS, 39])
def test_neighbours_are_those_of_a_naive_count(count: int) -> None:
    """Random vectors, some of them moved a little: the share is that of sets of sorted texts."""
    vectors = some_vectors()
    ours, theirs = similarities(vectors), similarities(vectors + some_vectors(seed=2) / 3)
    assert neighbour_overlap(ours, theirs, count) == pytest.approx(naive_overlap(ours, theirs, count))


def test_identical_vectors_keep_every_neighbour_and_every_rank() -> None:
    """All three figures are 1."""
    vectors = some_vectors()
    same = similarities(vectors)
    assert cosines(vectors, vectors) == pytest.approx(np.ones(40))
    assert neighbour_overlap(same, same) == 1
    assert spearman(same, same) == pytest.approx(1)


def test_exchanged_vectors_lose_their_neighbours() -> None:
    """The same vectors given to other texts: overlap falls to about what chance gives, and ranks to about 0."""
    vectors = some_vectors(200)
    ours, theirs = similarities(vectors[np.random.default_rng(3).permutation(200)]), similarities(vectors)
    overlap, correlation = neighbour_overlap(ours, theirs), spearman(ours, theirs)
    assert overlap is not None
    assert correlation is not None
    assert overlap < 0.15
    assert abs(correlation) < 0.1


def test_of_equally_near_texts_the_first_are_neighbours() -> None:
    """Texts that are all alike have the same neighbours on both sides, whatever the order of sorting."""
    alike = np.ones((30, 30))
    assert neighbour_overlap(alike, alike) == 1


def test_few_texts_have_all_others_as_neighbours() -> None:
    """With no more than ten others none can be lost; with no other there is no figure."""
    ours, theirs = (
        similarities(some_vectors(NEIGHBOURS + 1)),
        similarities(some_vectors(NEIGHBOURS + 1, seed=4)),
    )
    assert neighbour_overlap(ours, theirs) == 1
    assert neighbour_overlap(ours[:1, :1], theirs[:1, :1]) is None


def test_a_text_is_not_its_own_neighbour() -> None:
    """Though nothing is nearer to it: else every share would be too high by one."""
    before, after = line(0, 1, 3), line(0, 1, -0.5)
    assert neighbour_overlap(before, after, 1) == naive_overlap(before, after, 1) == 1 / 3


# --- ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decimals", [1, 12])
def test_ranks_correlate_as_scipy_says(decimals: int) -> None:
    """Over all pairs of different texts, with many equal similarities and with none."""
    vectors = some_vectors()
    ours = similarities(vectors).round(decimals)
    theirs = similarities(vectors + some_vectors(seed=5)).round(decimals)
    pairs = list(combinations(range(40), 2))
    expected = spearmanr([ours[pair] for pair in pairs], [theirs[pair] for pair in pairs]).statistic
    assert spearman(ours, theirs) == pytest.approx(expected)


def test_ranks_that_are_turned_round_give_minus_one() -> None:
    """What was nearest is farthest; by how much does not count."""
    near = line(0, 1, 3, 7)
    assert spearman(near, near**3) == pytest.approx(1)
    assert spearman(near, -near) == pytest.approx(-1)


def test_without_ranks_there_is_no_correlation() -> None:
    """Two texts have one pair, and pairs that are all alike have no order: None, not a wrong figure."""
    assert spearman(line(0, 1), line(0, 1)) is None
    assert spearman(np.ones((5, 5)), line(0, 1, 3, 7, 9)) is None


# --- the corpus -------------------------------------------------------------------------------------------------


def test_the_corpus_is_several_hundred_texts_in_topics_of_ten() -> None:
    """Each text once, none empty, and ten to a topic."""
    assert len(corpus()) >= 300
    assert len(set(corpus())) == len(corpus())
    assert all(text.strip() == text and text for text in corpus())
    assert {len(texts) for texts in topics().values()} == {10}


def test_the_corpus_has_no_text_in_common_with_what_a_model_is_made_with() -> None:
    """A figure over texts that a model was calibrated on would be too good; the probes are counted beside it."""
    own = {text.casefold().strip() for text in corpus()}
    for others in (CALIBRATION, PROBES, long_probes(512)):
        assert own.isdisjoint(text.casefold().strip() for text in others)


def test_the_corpus_is_in_many_scripts() -> None:
    """Latin and Chinese in plenty, and several others."""
    scripts = Counter(script for text in corpus() for script in _scripts(text))
    assert scripts["LATIN"] >= 100
    assert scripts["CJK"] >= 50
    assert len([script for script, texts in scripts.items() if texts >= 5]) >= 5, scripts


def test_a_part_of_the_corpus_is_whole_topics() -> None:
    """A share keeps each of its texts among the ten of its topic, and is never less than a few topics."""
    whole = [set(texts) for texts in topics().values()]
    for share, least in ((0.0, 10 * MIN_TOPICS), (0.3, 100), (1.0, 300), (7.0, 300)):
        part = set(corpus(share))
        assert len(part) >= least
        assert len(part) == len(corpus(share))
        assert all(topic <= part or topic.isdisjoint(part) for topic in whole)
    assert corpus(7.0) == corpus()
    assert len(corpus(0.0)) == 10 * MIN_TOPICS
    assert len(corpus(0.3)) < len(corpus())


def test_the_digest_is_of_the_texts() -> None:
    """A sha256 in hex, so that other texts have other figures in the cache."""
    assert len(bytes.fromhex(corpus_digest())) == 32


def _scripts(text: str) -> set[str]:
    return {unicodedata.name(letter, "").split()[0] for letter in text if letter.isalpha()}
