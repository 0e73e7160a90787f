"""Pipelines of repositories without modules.json, and pipelines that the settings override."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from emb_model_provider.backends.pytorch.backend import TorchBackend
from emb_model_provider.errors import UnsupportedModelError
from tests.backends.helpers import TEXTS, cosines, embed_texts, reference
from tests.backends.small_tokenizers import LENGTH, byte_bpe, unigram, wordpiece
from tests.models import (
    bert,
    gte_configuration,
    qwen3,
    reference_bert,
    save_bare,
    save_modelscope,
    snapshot_of,
    spec_of,
    xlm_roberta,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

GTE = "iic/nlp_gte_sentence-embedding_chinese-base"


def load(directory: Path, *, repository: str = "test/small", **spec: Any) -> TorchBackend:
    snapshot = snapshot_of(directory, repository=repository)
    return TorchBackend(spec_of(**spec), snapshot, trust_remote_code=False)


def pooled_by_hand(directory: Path, pooling: str) -> NDArray[np.float32]:
    """Return CLS or mean vectors, computed with transformers, text by text."""
    model, tokenizer = reference_bert(directory), wordpiece()
    rows = []
    for text in TEXTS:
        inputs = tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.inference_mode():
            tokens = model(**inputs).last_hidden_state[0]
        rows.append((tokens[0] if pooling == "cls" else tokens.mean(dim=0)).numpy())
    return np.stack(rows)


def assert_parallel(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    assert cosines(ours, theirs).min() >= 0.99999


def test_modelscope_gte_is_normalized_cls(tmp_path: Path) -> None:
    """And not the mean, which sentence-transformers would use."""
    directory = save_modelscope(tmp_path / "gte", gte_configuration(emb_pooler_type="cls", normalize=True))
    backend = load(directory, repository=GTE, max_length=LENGTH)
    vectors = embed_texts(backend, TEXTS)
    assert_parallel(vectors, pooled_by_hand(directory, "cls"))
    assert cosines(vectors, pooled_by_hand(directory, "mean")).min() < 0.98
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-4)
    assert any(".bin" in note for note in backend.description.notes)
    assert (backend.description.pooling, backend.description.normalize) == ("cls", True)


def test_modelscope_corom_is_cls_without_normalization(tmp_path: Path) -> None:
    """Its directory has only vocab.txt, and no pooling keys."""
    directory = save_modelscope(tmp_path / "corom", gte_configuration(), vocab_only=True)
    backend = load(directory, max_length=LENGTH)
    vectors, expected = embed_texts(backend, TEXTS), pooled_by_hand(directory, "cls")
    assert_parallel(vectors, expected)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), np.linalg.norm(expected, axis=1), rtol=1e-4)


def test_modelscope_models_have_the_length_of_the_model_up_to_512(tmp_path: Path) -> None:
    """The limit of the tokenizer, which is 48 here, is ignored."""
    directory = save_modelscope(tmp_path / "gte", gte_configuration(), safetensors=True)
    backend = load(directory)
    assert backend.description.max_length == 64
    assert not any(".bin" in note for note in backend.description.notes)


def test_a_gte_name_without_configuration_is_normalized_cls(tmp_path: Path) -> None:
    """The name of the repository decides."""
    directory = save_modelscope(tmp_path / "gte", None)
    vectors = embed_texts(load(directory, repository=GTE, max_length=LENGTH), TEXTS)
    assert_parallel(vectors, pooled_by_hand(directory, "cls"))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-4)


def test_a_bare_directory_uses_the_default_of_sentence_transformers(tmp_path: Path) -> None:
    """Mean pooling without normalization, and a note."""
    directory = save_bare(tmp_path / "bare", bert, wordpiece())
    backend = load(directory)
    vectors = embed_texts(backend, TEXTS)
    expected = reference(directory).encode(TEXTS, show_progress_bar=False)
    assert_parallel(vectors, expected)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), np.linalg.norm(expected, axis=1), rtol=1e-4)
    assert any("guess" in note for note in backend.description.notes)


def test_a_bare_causal_model_uses_the_last_token(tmp_path: Path) -> None:
    """This is the default of sentence-transformers, too."""
    tokenizer = byte_bpe(around=("", "<|endoftext|>"), padding_side="left")
    directory = save_bare(tmp_path / "bare", qwen3, tokenizer)
    backend = load(directory)
    assert backend.description.pooling == "lasttoken"
    assert_parallel(embed_texts(backend, TEXTS), reference(directory).encode(TEXTS, show_progress_bar=False))


def test_a_chat_template_is_not_used(tmp_path: Path) -> None:
    """sentence-transformers would render each text as a chat message. A note says so."""
    around = ("", "<|endoftext|>")
    template = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
    plain = save_bare(tmp_path / "plain", qwen3, byte_bpe(around=around))
    with_template = save_bare(tmp_path / "template", qwen3, byte_bpe(around=around, chat_template=template))
    backend = load(with_template)
    assert any("chat template" in note for note in backend.description.notes)
    assert_parallel(embed_texts(backend, TEXTS), reference(plain).encode(TEXTS, show_progress_bar=False))


def test_configured_pooling_replaces_the_declared_one(family_directory: Callable[[str], Path]) -> None:
    """Normalize is kept."""
    backend = load(family_directory("bert-mean-normalize"), pooling="cls")
    vectors = embed_texts(backend, TEXTS)
    assert_parallel(vectors, pooled_by_hand(family_directory("bert-mean-normalize"), "cls"))
    assert (backend.description.pooling, backend.description.normalize) == ("cls", True)
    assert any("pooling=cls" in note for note in backend.description.notes)


def test_configured_normalize_replaces_the_declared_one(family_directory: Callable[[str], Path]) -> None:
    """In both directions."""
    off = load(family_directory("bert-mean-normalize"), normalize=False)
    on = load(family_directory("bert-cls"), normalize=True)
    assert (off.description.normalize, on.description.normalize) == (False, True)
    lengths = np.linalg.norm(embed_texts(off, TEXTS), axis=1)
    assert np.abs(lengths - 1).min() > 0.01
    np.testing.assert_allclose(np.linalg.norm(embed_texts(on, TEXTS), axis=1), 1, rtol=1e-4)


def test_configured_max_length_and_prompts_are_used(family_directory: Callable[[str], Path]) -> None:
    """The length may exceed that of the tokenizer, but not the positions of the model; a note says so."""
    directory = family_directory("bert-mean-normalize")
    within = load(directory, max_length=60, prompts={"query": "q: "})
    beyond = load(directory, max_length=9000)
    assert within.description.max_length == 60
    assert within.description.prompts["query"] == "q: "
    assert beyond.description.max_length == 64
    assert any("9000" in note for note in beyond.description.notes)


def test_a_tokenizer_without_a_limit_has_that_of_the_model(tmp_path: Path) -> None:
    """Without the two reserved positions of XLM-R, which sentence-transformers would exceed."""
    directory = save_bare(tmp_path / "bare", xlm_roberta, unigram(model_max_length=None))
    backend = load(directory)
    assert backend.description.max_length == LENGTH
    assert np.isfinite(embed_texts(backend, TEXTS)).all()


def test_configured_pooling_without_a_pooling_module_is_an_error(tmp_path: Path) -> None:
    """The model can be loaded without it."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    torch.manual_seed(3)
    static = StaticEmbedding(wordpiece().backend_tokenizer, embedding_dim=24)
    directory = tmp_path / "static"
    model = SentenceTransformer(modules=[static], device="cpu", local_files_only=True)
    model.save(str(directory), create_model_card=False)
    with pytest.raises(UnsupportedModelError, match="0 Pooling modules"):
        load(directory, pooling="cls")
    backend = load(directory)
    texts = [text for text in TEXTS if text.strip()]
    assert_parallel(embed_texts(backend, texts), reference(directory).encode(texts, show_progress_bar=False))
    assert backend.description.pooling == "-"
