"""Tokens through the torch backend give what sentence-transformers' own `encode` gives, in fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.backends.pytorch.backend import TorchBackend
from emb_model_provider.backends.tokenization import Tokenization
from tests.backends.comparison import TEXTS, cosines, embed_texts, reference, spread
from tests.backends.small_tokenizers import LENGTH
from tests.models import FAMILIES, bundled_directory, snapshot_of, spec_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

UNLIKE = [0, 1, 2, 3, 4, 5, 10, 11]
"""Texts that a model must tell apart for a comparison to mean something."""


def load(directory: Path, **spec: object) -> TorchBackend:
    return TorchBackend(spec_of(**spec), snapshot_of(directory), trust_remote_code=False)


def assert_same(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float32
    assert cosines(ours, theirs).min() >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1), rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_sentence_transformers(family: str, family_directory: Callable[[str], Path]) -> None:
    """Texts of every kind, in one mixed batch and one by one, get sentence-transformers' vectors."""
    directory = family_directory(family)
    expected = reference(directory).encode(TEXTS, batch_size=5, show_progress_bar=False)
    backend = load(directory)
    together = embed_texts(backend, TEXTS)
    alone = np.concatenate([embed_texts(backend, [text]) for text in TEXTS])
    assert spread(expected[UNLIKE]) < 0.99
    assert_same(together, expected)
    assert_same(alone, expected)


@pytest.mark.parametrize("family", ["bert-prompts-excluded", "qwen3-left"])
def test_prompts_equal_sentence_transformers(family: str, family_directory: Callable[[str], Path]) -> None:
    """Every prompt that a model declares, with its tokens pooled or left out, gives its vectors."""
    directory = family_directory(family)
    model = reference(directory)
    backend = load(directory)
    plain = model.encode(TEXTS, prompt="", show_progress_bar=False)
    for name, prompt in backend.description.prompts.items():
        expected = model.encode(TEXTS, prompt_name=name, show_progress_bar=False)
        assert_same(embed_texts(backend, TEXTS, prompt=prompt), expected)
        if prompt:
            assert cosines(expected, plain).min() < 0.999


def test_an_input_without_prompt_differs_from_the_default_prompt(
    family_directory: Callable[[str], Path],
) -> None:
    """A model's default prompt is used unless another, or an empty one, is given."""
    directory = family_directory("bert-prompts-excluded")
    backend = load(directory)
    expected = reference(directory).encode(TEXTS, prompt="", show_progress_bar=False)
    assert_same(embed_texts(backend, TEXTS, prompt=""), expected)
    assert backend.description.default_prompt == "document"
    assert backend.description.excludes_prompt


def test_prompts_of_different_lengths_share_a_batch(family_directory: Callable[[str], Path]) -> None:
    """Rows keep their own prompt length although sentence-transformers pools with one per batch."""
    backend = load(family_directory("bert-prompts-excluded"))
    tokenize = Tokenization(backend.description).encode
    text = "How do I reset my password?"
    prompts = ["passage: retrieve ", "", "query: ", "passage: retrieve "]
    rows = [tokenize([text], prompt=prompt, truncate="END") for prompt in prompts]
    mixed = backend.embed(
        TokenBatch(ids=[row.ids[0] for row in rows], prompt_lengths=[row.prompt_lengths[0] for row in rows])
    )
    single = [backend.embed(TokenBatch(ids=row.ids, prompt_lengths=row.prompt_lengths))[0] for row in rows]
    assert len({row.prompt_lengths[0] for row in rows}) == 3
    assert_same(mixed, np.stack(single))


def test_matryoshka_sizes_equal_sentence_transformers(family_directory: Callable[[str], Path]) -> None:
    """The declared sizes are described, and cutting to one gives what `truncate_dim` gives."""
    directory = family_directory("bert-matryoshka")
    backend = load(directory)
    assert backend.description.matryoshka == (16, 32)
    expected = reference(directory).encode(TEXTS, truncate_dim=16, show_progress_bar=False)
    assert_same(embed_texts(backend, TEXTS)[:, :16], expected)


def test_a_declared_truncate_dim_is_the_native_size(family_directory: Callable[[str], Path]) -> None:
    """Vectors are cut after the last module, as `encode` does; normalize=true restores length 1."""
    directory = family_directory("bert-truncate-dim")
    expected = reference(directory).encode(TEXTS, show_progress_bar=False)
    as_declared, normalized = load(directory), load(directory, normalize=True)
    assert as_declared.description.dimension == normalized.description.dimension == expected.shape[1] == 24
    assert any("truncate_dim" in note for note in as_declared.description.notes)
    units = embed_texts(normalized, TEXTS)
    assert cosines(units, expected).min() >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1, rtol=1e-4)
    assert np.linalg.norm(expected, axis=1).max() < 0.99


def test_the_bundled_model_equals_sentence_transformers() -> None:
    """The model that ships with the package: 384 wide, 256 tokens, normalized."""
    directory = bundled_directory()
    texts = [*TEXTS, "word " * 600]
    expected = reference(directory).encode(texts, batch_size=4, show_progress_bar=False)
    backend = load(directory)
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
    """What serving reads of a model is what its files declare."""
    found = load(family_directory(family)).description
    assert (found.padding_side, found.pooling, found.normalize) == (side, pooling, normalize)
    assert (found.max_length, found.precision, found.device, found.backend) == (
        LENGTH,
        "fp32",
        "cpu",
        "torch",
    )
    assert found.notes == ()
