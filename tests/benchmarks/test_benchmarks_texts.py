"""Texts have the lengths they are said to have, and none comes twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from tokenizers import Tokenizer

from benchmarks.texts import Corpus, draw_lengths, tokens_in
from benchmarks.workloads import read_inputs, write_bodies
from emb_model_provider.hubs.local import find_bundled

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.texts import Kind


@pytest.mark.parametrize(("kind", "mean", "longest"), [("short", 13, 18), ("doc", 92, 256)])
def test_lengths_are_drawn_as_stated(kind: Kind, mean: float, longest: int) -> None:
    """The mean is the one that tables name, and no text is longer than the model reads."""
    lengths = draw_lengths(kind, 100_000, np.random.default_rng(0))
    assert lengths.mean() == pytest.approx(mean, rel=0.01)
    assert (lengths.min(), lengths.max()) == (8, longest)


@pytest.mark.parametrize("kind", ["short", "doc"])
def test_a_text_has_the_tokens_it_is_counted_for(kind: Kind) -> None:
    """The model's own tokenizer counts what `tokens_in` counts."""
    tokenizer = Tokenizer.from_file(str(find_bundled() / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    for text in Corpus().texts(kind, 200):
        assert len(tokenizer.encode(text).ids) == tokens_in(text)


def test_no_text_comes_twice_and_a_seed_repeats_them_all() -> None:
    """A cache has nothing to answer from, and every contender gets the same."""
    corpus = Corpus(seed=1)
    drawn = [*corpus.texts("short", 5000), *corpus.texts("doc", 500), *corpus.texts("short", 5000)]
    assert len(set(drawn)) == len(drawn)
    again = Corpus(seed=1)
    assert again.texts("short", 5000) == drawn[:5000]


def test_bodies_hold_the_texts_of_a_request(tmp_path: Path) -> None:
    """One line a request, with as many texts as asked for."""
    inputs = read_inputs(write_bodies(tmp_path / "bodies", Corpus(), "doc", 3, 5, "base64"))
    assert [len(texts) for texts in inputs] == [3] * 5
