"""The three sets of texts have the sizes and the variety that they are documented to have, and do not overlap."""

from __future__ import annotations

import unicodedata
from collections import Counter

from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.fidelity.texts import (
    MIN_TOPICS,
    calibration_texts,
    corpus,
    corpus_digest,
    long_probes,
    probes,
    topics,
)
from tests.backends.helpers import bundled_description


def test_the_corpus_has_topics_of_ten_texts() -> None:
    """It has several hundred texts, each of them once, and none is empty."""
    assert len(corpus()) >= 300
    assert len(set(corpus())) == len(corpus())
    assert all(text.strip() == text and text for text in corpus())
    assert {len(texts) for texts in topics().values()} == {10}


def test_the_three_sets_do_not_overlap() -> None:
    """A value measured on texts of the calibration would be too good."""
    sets = [
        {text.casefold().strip() for text in texts}
        for texts in (corpus(), calibration_texts(), (*probes(), *long_probes(512)))
    ]
    assert len(set.union(*sets)) == sum(map(len, sets))


def test_calibration_has_more_than_a_hundred_texts() -> None:
    assert 100 <= len(set(calibration_texts())) == len(calibration_texts()) <= 300


def test_the_corpus_has_many_scripts() -> None:
    """Above all Latin and Chinese."""
    scripts = Counter(script for text in corpus() for script in _scripts(text))
    assert scripts["LATIN"] >= 100
    assert scripts["CJK"] >= 50
    assert len([script for script, texts in scripts.items() if texts >= 5]) >= 5, scripts


def test_a_part_of_the_corpus_has_whole_topics() -> None:
    """It has at least `MIN_TOPICS` topics."""
    whole = [set(texts) for texts in topics().values()]
    for share, minimum in ((0.0, 10 * MIN_TOPICS), (0.3, 100), (1.0, 300), (7.0, 300)):
        part = set(corpus(share))
        assert len(part) >= minimum
        assert len(part) == len(corpus(share))
        assert all(topic <= part or topic.isdisjoint(part) for topic in whole)
    assert corpus(7.0) == corpus()
    assert len(corpus(0.0)) == 10 * MIN_TOPICS
    assert len(corpus(0.3)) < len(corpus())


def test_the_digest_is_a_sha256() -> None:
    assert len(bytes.fromhex(corpus_digest())) == 32


def test_probes_have_many_lengths() -> None:
    """From one token besides the special ones to more than the model supports."""
    tokenization = Tokenization(bundled_description())
    lengths = {len(row) for row in tokenization.encode(probes(), truncate="END").ids}
    assert len(probes()) > 100
    assert len(set(probes())) == len(probes())
    assert min(lengths) <= 3
    assert len(lengths) > 30
    assert tokenization.encode(long_probes(256), truncate="END").truncated >= 1


def _scripts(text: str) -> set[str]:
    return {unicodedata.name(letter, "").split()[0] for letter in text if letter.isalpha()}
