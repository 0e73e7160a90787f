"""Static embeddings with torch, which serves those that numpy does not serve, and those on a GPU."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from sentence_transformers.sentence_transformer.modules import Normalize

from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.errors import InferenceError
from tests.backends.helpers import TEXTS, assert_same, cosines, embed_texts, load_torch, reference
from tests.models import save_static

if TYPE_CHECKING:
    from pathlib import Path

WITHOUT_TOKENS = ["", "   \n\t "]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return save_static(tmp_path / "static", Normalize())


def test_vectors_equal_sentence_transformers(directory: Path) -> None:
    texts = [text for text in TEXTS if text.strip()]
    assert_same(embed_texts(load_torch(directory), texts), reference(directory).encode(texts, show_progress_bar=False))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_text_without_tokens_has_a_zero_vector(precision: str, directory: Path) -> None:
    """As in sentence-transformers, alone and between other texts."""
    backend = load_torch(directory, precision=precision)
    assert not embed_texts(backend, WITHOUT_TOKENS).any()
    mixed = embed_texts(backend, ["hello", "", "world"])
    assert mixed.any(axis=1).tolist() == [True, False, True]
    assert not reference(directory).encode(WITHOUT_TOKENS, show_progress_bar=False).any()


def test_the_id_of_a_text_without_tokens_is_not_one_of_the_model(directory: Path) -> None:
    """Requests with token ids can use those of the model only."""
    from emb_model_provider.backends.base import TokenBatch

    backend = load_torch(directory)
    size = backend.description.vocab_size
    assert Tokenization(backend.description).encode([""]).ids == [[size]]
    with pytest.raises(InferenceError):
        backend.run(TokenBatch(ids=[[size + 1]], prompt_lengths=[0]))


def test_the_truncation_of_tokenizer_json_is_used(directory: Path) -> None:
    """sentence-transformers uses the tokenizer as it is."""
    contents = json.loads((directory / "tokenizer.json").read_text())
    truncation = {"max_length": 4, "direction": "Right", "strategy": "LongestFirst", "stride": 0}
    (directory / "tokenizer.json").write_text(json.dumps({**contents, "truncation": truncation}))
    texts = ["one two three four five six seven eight nine ten"]
    backend = load_torch(directory)
    assert backend.description.max_length == 4
    assert_same(embed_texts(backend, texts), reference(directory).encode(texts, show_progress_bar=False))


@pytest.mark.parametrize("normalize", [True, False])
def test_a_model2vec_directory_without_modules_is_loaded(normalize: bool, directory: Path, tmp_path: Path) -> None:
    """Its config.json says whether vectors are normalized."""
    bare = tmp_path / "model2vec"
    bare.mkdir()
    table = load_file(directory / "model.safetensors")["embedding.weight"]
    save_file({"embeddings": table}, bare / "model.safetensors")
    shutil.copy(directory / "tokenizer.json", bare)
    config = {"model_type": "model2vec", "architectures": ["StaticModel"], "normalize": normalize}
    (bare / "config.json").write_text(json.dumps(config))
    backend = load_torch(bare)
    texts = [text for text in TEXTS if text.strip()]
    vectors = embed_texts(backend, texts)
    assert cosines(vectors, reference(directory).encode(texts, show_progress_bar=False)).min() >= 0.99999
    assert backend.description.normalize is normalize
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-4) is normalize
