"""Lengths and uniqueness of the texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from tokenizers import Tokenizer

from benchmarks.texts import Corpus, count_texts, count_tokens, draw_lengths
from benchmarks.workloads import read_inputs, write_bodies
from emb_model_provider.hubs.local import find_bundled

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.texts import Kind


@pytest.mark.parametrize(("kind", "mean", "longest"), [("short", 13, 18), ("doc", 92, 256)])
def test_lengths_follow_the_stated_distribution(kind: Kind, mean: float, longest: int) -> None:
    """The mean is the one in the tables, and no text is longer than the model allows."""
    lengths = draw_lengths(kind, 100_000, np.random.default_rng(0))
    assert lengths.mean() == pytest.approx(mean, rel=0.01)
    assert (lengths.min(), lengths.max()) == (8, longest)


@pytest.mark.parametrize("kind", ["short", "doc"])
def test_count_tokens_agrees_with_the_tokenizer(kind: Kind) -> None:
    """The number of tokens is computed without a tokenizer."""
    tokenizer = Tokenizer.from_file(str(find_bundled() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    texts = Corpus().texts(kind, 200)
    assert [count_tokens(text) for text in texts] == [len(tokenizer.encode(text).ids) for text in texts]
    assert len(texts) == 200


def test_texts_are_unique_and_a_seed_repeats_them() -> None:
    """A server cannot answer from a cache, and all contenders get the same texts."""
    corpus = Corpus(seed=1)
    texts = [*corpus.texts("short", 5000), *corpus.texts("doc", 500), *corpus.texts("short", 5000)]
    assert len(set(texts)) == len(texts) == 10_500
    assert Corpus(seed=1).texts("short", 5000) == texts[:5000]


def test_bodies_contain_the_texts_of_requests(tmp_path: Path) -> None:
    """Each body has the requested number of texts."""
    inputs = read_inputs(write_bodies(tmp_path / "bodies", Corpus(), "doc", 3, 5, "base64"))
    assert [len(texts) for texts in inputs] == [3] * 5


@pytest.mark.parametrize(("kind", "count", "text"), [("short", 1, "1 short text"), ("doc", 32, "32 documents")])
def test_counts_of_texts(kind: Kind, count: int, text: str) -> None:
    """More than one text is a plural."""
    assert count_texts(kind, count) == text
