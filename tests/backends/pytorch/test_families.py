"""At fp32 the torch backend returns the vectors of `encode` of sentence-transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.backends.tokenization import Tokenization
from tests.backends.helpers import (
    DISTINCT,
    TEXTS,
    assert_same,
    cosines,
    embed_texts,
    highest_similarity,
    load_torch,
    reference,
)
from tests.backends.small_tokenizers import LENGTH
from tests.models import FAMILIES, bundled_directory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_sentence_transformers(family: str, family_directory: Callable[[str], Path]) -> None:
    """For texts of all kinds, in one mixed batch and one by one."""
    directory = family_directory(family)
    expected = reference(directory).encode(TEXTS, batch_size=5, show_progress_bar=False)
    backend = load_torch(directory)
    together = embed_texts(backend, TEXTS)
    alone = np.concatenate([embed_texts(backend, [text]) for text in TEXTS])
    assert highest_similarity(expected[DISTINCT]) < 0.99
    assert_same(together, expected)
    assert_same(alone, expected)


@pytest.mark.parametrize("family", ["bert-prompts-excluded", "qwen3-left"])
def test_prompts_equal_sentence_transformers(family: str, family_directory: Callable[[str], Path]) -> None:
    """For each declared prompt, whether its tokens are pooled or excluded."""
    directory = family_directory(family)
    model = reference(directory)
    backend = load_torch(directory)
    plain = model.encode(TEXTS, prompt="", show_progress_bar=False)
    assert backend.description.prompts
    for name, prompt in backend.description.prompts.items():
        expected = model.encode(TEXTS, prompt_name=name, show_progress_bar=False)
        assert_same(embed_texts(backend, TEXTS, prompt=prompt), expected)
        if prompt:
            assert cosines(expected, plain).min() < 0.999


def test_an_empty_prompt_replaces_the_default_prompt(family_directory: Callable[[str], Path]) -> None:
    """The vectors are those of the texts without a prompt."""
    directory = family_directory("bert-prompts-excluded")
    backend = load_torch(directory)
    expected = reference(directory).encode(TEXTS, prompt="", show_progress_bar=False)
    assert_same(embed_texts(backend, TEXTS, prompt=""), expected)
    assert backend.description.default_prompt == "document"
    assert backend.description.excludes_prompt


def test_prompts_of_different_lengths_share_a_batch(family_directory: Callable[[str], Path]) -> None:
    """Each row has its own prompt length, although Pooling supports only one per batch."""
    backend = load_torch(family_directory("bert-prompts-excluded"))
    tokenize = Tokenization(backend.description).encode
    text = "How do I reset my password?"
    prompts = ["passage: retrieve ", "", "query: ", "passage: retrieve "]
    rows = [tokenize([text], prompt=prompt, truncate="END") for prompt in prompts]
    mixed = backend.run(
        TokenBatch(ids=[row.ids[0] for row in rows], prompt_lengths=[row.prompt_lengths[0] for row in rows])
    ).dense
    single = [backend.run(TokenBatch(ids=row.ids, prompt_lengths=row.prompt_lengths)).dense[0] for row in rows]
    assert len({row.prompt_lengths[0] for row in rows}) == 3
    assert_same(mixed, np.stack(single))


def test_matryoshka_sizes_equal_sentence_transformers(family_directory: Callable[[str], Path]) -> None:
    """Truncated vectors equal those with `truncate_dim`, and the sizes are in the description."""
    directory = family_directory("bert-matryoshka")
    backend = load_torch(directory)
    assert backend.description.matryoshka == (16, 32)
    expected = reference(directory).encode(TEXTS, truncate_dim=16, show_progress_bar=False)
    assert_same(embed_texts(backend, TEXTS)[:, :16], expected)


def test_a_declared_truncate_dim_is_the_dimension(family_directory: Callable[[str], Path]) -> None:
    """Vectors are truncated after the last module, as by `encode`; normalize=true makes their length 1 again."""
    directory = family_directory("bert-truncate-dim")
    expected = reference(directory).encode(TEXTS, show_progress_bar=False)
    as_declared, normalized = load_torch(directory), load_torch(directory, normalize=True)
    assert as_declared.description.dimension == normalized.description.dimension == expected.shape[1] == 24
    assert any("truncate_dim" in note for note in as_declared.description.notes)
    units = embed_texts(normalized, TEXTS)
    assert cosines(units, expected).min() >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1, rtol=1e-4)
    assert np.linalg.norm(expected, axis=1).max() < 0.99


def test_the_bundled_model_equals_sentence_transformers() -> None:
    """It has 384 dimensions and 256 tokens, and is normalized."""
    directory = bundled_directory()
    texts = [*TEXTS, "word " * 600]
    expected = reference(directory).encode(texts, batch_size=4, show_progress_bar=False)
    backend = load_torch(directory)
    assert_same(embed_texts(backend, texts), expected)
    description = backend.description
    assert (description.dimension, description.max_length, description.vocab_size) == (384, 256, 30522)
    assert (description.normalize, description.pooling) == (True, "mean")


@pytest.mark.parametrize(
    ("family", "side", "pooling", "normalize"),
    [
        ("bert-mean-normalize", "right", "mean", True),
        ("bert-cls", "right", "cls", False),
        ("qwen3-left", "left", "lasttoken", True),
        ("qwen3-right", "right", "lasttoken", True),
    ],
)
def test_descriptions(
    family: str, side: str, pooling: str, normalize: bool, family_directory: Callable[[str], Path]
) -> None:
    """The description of a model has the values that its files declare."""
    described = load_torch(family_directory(family)).description
    assert (described.padding_side, described.pooling, described.normalize) == (side, pooling, normalize)
    assert (described.max_length, described.precision, described.device, described.backend) == (
        LENGTH,
        "fp32",
        "cpu",
        "torch",
    )
    assert described.notes == ()
