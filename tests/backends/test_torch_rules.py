"""The rule table on real directories: ModelScope's, bare ones, and the operator's word over both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from emb_model_provider.backends.pytorch.backend import TorchBackend
from emb_model_provider.errors import UnsupportedModelError
from tests.backends.comparison import TEXTS, cosines, embed_texts, reference
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


def by_hand(directory: Path, how: str) -> NDArray[np.float32]:
    """Return CLS or mean vectors from transformers alone, one text at a time, without any pipeline."""
    model, tokenizer = reference_bert(directory), wordpiece()
    rows = []
    for text in TEXTS:
        inputs = tokenizer(text, truncation=True, max_length=LENGTH, return_tensors="pt")
        with torch.inference_mode():
            tokens = model(**inputs).last_hidden_state[0]
        rows.append((tokens[0] if how == "cls" else tokens.mean(dim=0)).numpy())
    return np.stack(rows)


def assert_parallel(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    assert cosines(ours, theirs).min() >= 0.99999


def test_modelscope_gte_is_the_normalized_cls_vector(tmp_path: Path) -> None:
    """A GTE directory of `.bin` weights gives the CLS vector at length 1, not sentence-transformers' mean."""
    directory = save_modelscope(tmp_path / "gte", gte_configuration(emb_pooler_type="cls", normalize=True))
    backend = load(directory, repository=GTE, max_length=LENGTH)
    vectors = embed_texts(backend, TEXTS)
    assert_parallel(vectors, by_hand(directory, "cls"))
    assert cosines(vectors, by_hand(directory, "mean")).min() < 0.98
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-4)
    assert any(".bin" in note for note in backend.description.notes)
    assert (backend.description.pooling, backend.description.normalize) == ("cls", True)


def test_modelscope_corom_is_the_cls_vector_at_its_own_length(tmp_path: Path) -> None:
    """A coROM directory, which has vocab.txt alone and no pooling keys, gives the CLS vector as it is."""
    directory = save_modelscope(tmp_path / "corom", gte_configuration(), vocab_only=True)
    backend = load(directory, max_length=LENGTH)
    vectors, expected = embed_texts(backend, TEXTS), by_hand(directory, "cls")
    assert_parallel(vectors, expected)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), np.linalg.norm(expected, axis=1), rtol=1e-4)


def test_modelscopes_limit_is_the_models_own_up_to_512(tmp_path: Path) -> None:
    """The tokenizer's limit is not read: 64 positions give 64 tokens although the tokenizer says 48."""
    directory = save_modelscope(tmp_path / "gte", gte_configuration(), safetensors=True)
    backend = load(directory)
    assert backend.description.max_length == 64
    assert not any(".bin" in note for note in backend.description.notes)


def test_a_gte_name_alone_is_the_normalized_cls_vector(tmp_path: Path) -> None:
    """Without configuration.json the repository's name decides."""
    directory = save_modelscope(tmp_path / "gte", None)
    vectors = embed_texts(load(directory, repository=GTE, max_length=LENGTH), TEXTS)
    assert_parallel(vectors, by_hand(directory, "cls"))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-4)


def test_a_bare_directory_is_sentence_transformers_guess(tmp_path: Path) -> None:
    """Mean pooling, not normalized, and a note that says it was a guess."""
    directory = save_bare(tmp_path / "bare", bert, wordpiece())
    backend = load(directory)
    vectors = embed_texts(backend, TEXTS)
    expected = reference(directory).encode(TEXTS, show_progress_bar=False)
    assert_parallel(vectors, expected)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), np.linalg.norm(expected, axis=1), rtol=1e-4)
    assert any("guess" in note for note in backend.description.notes)


def test_a_bare_causal_model_is_its_last_token(tmp_path: Path) -> None:
    """sentence-transformers guesses last-token pooling for a causal language model."""
    tokenizer = byte_bpe(around=("", "<|endoftext|>"), padding_side="left")
    directory = save_bare(tmp_path / "bare", qwen3, tokenizer)
    backend = load(directory)
    assert backend.description.pooling == "lasttoken"
    assert_parallel(embed_texts(backend, TEXTS), reference(directory).encode(TEXTS, show_progress_bar=False))


def test_a_bare_model_with_a_chat_template_reads_plain_text(tmp_path: Path) -> None:
    """sentence-transformers would render each text as a chat message; plain text is pinned, and noted."""
    around = ("", "<|endoftext|>")
    template = "{% for m in messages %}<|user|>{{ m['content'] }}{% endfor %}"
    plain = save_bare(tmp_path / "plain", qwen3, byte_bpe(around=around))
    chatty = save_bare(tmp_path / "chatty", qwen3, byte_bpe(around=around, chat_template=template))
    backend = load(chatty)
    assert any("chat template" in note for note in backend.description.notes)
    assert_parallel(embed_texts(backend, TEXTS), reference(plain).encode(TEXTS, show_progress_bar=False))


def test_the_operators_pooling_replaces_the_modules_own(family_directory: Callable[[str], Path]) -> None:
    """pooling=cls on a model saved with mean pooling gives its CLS vectors; Normalize stays."""
    backend = load(family_directory("bert-mean-normalize"), pooling="cls")
    vectors = embed_texts(backend, TEXTS)
    assert_parallel(vectors, by_hand(family_directory("bert-mean-normalize"), "cls"))
    assert (backend.description.pooling, backend.description.normalize) == ("cls", True)
    assert any("pooling=cls" in note for note in backend.description.notes)


def test_the_operators_normalize_replaces_the_modules_own(family_directory: Callable[[str], Path]) -> None:
    """normalize=false takes Normalize away, and normalize=true puts it there."""
    off = load(family_directory("bert-mean-normalize"), normalize=False)
    on = load(family_directory("bert-cls"), normalize=True)
    assert (off.description.normalize, on.description.normalize) == (False, True)
    lengths = np.linalg.norm(embed_texts(off, TEXTS), axis=1)
    assert np.abs(lengths - 1).min() > 0.01
    np.testing.assert_allclose(np.linalg.norm(embed_texts(on, TEXTS), axis=1), 1, rtol=1e-4)


def test_the_operators_max_length_and_prompts_are_used(family_directory: Callable[[str], Path]) -> None:
    """A longer limit than the tokenizer's is taken, up to the model's positions, which is noted."""
    directory = family_directory("bert-mean-normalize")
    within = load(directory, max_length=60, prompts={"query": "q: "})
    beyond = load(directory, max_length=9000)
    assert within.description.max_length == 60
    assert within.description.prompts["query"] == "q: "
    assert beyond.description.max_length == 64
    assert any("9000" in note for note in beyond.description.notes)


def test_a_tokenizer_without_a_limit_gets_the_models_real_one(tmp_path: Path) -> None:
    """XLM-R's two reserved positions are not counted, where sentence-transformers would overrun them."""
    directory = save_bare(tmp_path / "bare", xlm_roberta, unigram(model_max_length=None))
    backend = load(directory)
    assert backend.description.max_length == LENGTH
    assert np.isfinite(embed_texts(backend, TEXTS)).all()


def test_pooling_that_would_not_fit_is_refused(tmp_path: Path) -> None:
    """A pooling cannot be put where there is none."""
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
