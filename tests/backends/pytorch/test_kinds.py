"""Models of other kinds than dense embeddings, with the torch backend, equal the library that defines their results."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import UnsupportedModelError
from emb_model_provider.fidelity.cases import Runner, make_cases
from emb_model_provider.fidelity.compare import compare
from tests import kind_checks
from tests.backends.helpers import load_torch
from tests.backends.small_tokenizers import byte_bpe
from tests.kind_models import (
    CLASSIFIERS,
    MULTI_VECTOR,
    ONE_OF_EACH,
    RERANKERS,
    SPARSE,
    save_bare_qwen3_reranker,
    save_bge_m3,
    save_inference_free_splade,
)
from tests.models import qwen3, save_bare

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", RERANKERS)
def test_reranker(name: str, tmp_path: Path) -> None:
    directory = RERANKERS[name](tmp_path / "model")
    backend = load_torch(directory)
    assert (backend.description.kind, backend.description.tasks) == ("reranker", ("rerank",))
    kind_checks.check_reranker(directory, backend)


def test_bare_qwen3_reranker(tmp_path: Path) -> None:
    """It has the prompt of its model card, with the instruction of a request. A note says so."""
    directory = save_bare_qwen3_reranker(tmp_path / "model")
    backend = load_torch(directory, kind="reranker")
    assert backend.description.activation == "sigmoid"
    assert any("Qwen3-Reranker" in note for note in backend.description.notes)
    kind_checks.check_bare_qwen3_reranker(directory, backend)


def test_a_language_model_without_a_prompt_for_pairs_is_an_error(tmp_path: Path) -> None:
    """sentence-transformers would score the two texts without any prompt. The message says what to choose."""
    directory = save_bare_qwen3_reranker(tmp_path / "model")
    config = json.loads((directory / "config.json").read_text())
    other = {**config, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (directory / "config.json").write_text(json.dumps(other))
    with pytest.raises(UnsupportedModelError, match=r"do not say how a query and a document.*modules\.json"):
        load_torch(directory, kind="reranker")


def test_a_language_model_without_words_for_a_score_is_an_error(tmp_path: Path) -> None:
    directory = save_bare(tmp_path / "model", qwen3, byte_bpe(around=("", "")))
    with pytest.raises(UnsupportedModelError, match="by the words yes and no"):
        load_torch(directory, kind="reranker")


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier(name: str, tmp_path: Path) -> None:
    directory = CLASSIFIERS[name](tmp_path / "model")
    backend = load_torch(directory)
    assert (backend.description.activation, len(backend.description.labels)) == ("softmax", 3)
    kind_checks.check_classifier(directory, backend)


@pytest.mark.parametrize("name", SPARSE)
def test_sparse(name: str, tmp_path: Path) -> None:
    directory = SPARSE[name](tmp_path / "model")
    kind_checks.check_sparse(directory, load_torch(directory))


def test_inference_free_sparse(tmp_path: Path) -> None:
    """Queries have the weights of a table, documents those of a transformer."""
    directory = save_inference_free_splade(tmp_path / "model")
    for task in ("query", "document"):
        kind_checks.check_sparse(directory, load_torch(directory, route=task), task)


@pytest.mark.parametrize("name", MULTI_VECTOR)
def test_multi_vector(name: str, tmp_path: Path) -> None:
    directory = MULTI_VECTOR[name](tmp_path / "model")
    kind_checks.check_multi_vector(directory, load_torch(directory))


def test_bge_m3(tmp_path: Path) -> None:
    """Its three outputs come from one pass."""
    directory = save_bge_m3(tmp_path / "model")
    backend = load_torch(directory)
    assert backend.description.tasks == ("embed", "embed_sparse", "embed_multi_vector")
    kind_checks.check_bge_m3(directory, backend)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_lower_precisions(kind: str, precision: str, tmp_path: Path) -> None:
    """Each output is measured, is not equal to that at fp32, and vectors of tokens and texts are close to it.

    The others are relative to values that can be near zero with random weights: the weights of the terms of bge-m3, and the
    spread of the scores of a query.
    """
    directory = ONE_OF_EACH[kind](tmp_path / "model")
    exact = load_torch(directory)
    cases = make_cases(Runner(exact), exact.description, corpus_s=0)
    backend = load_torch(directory, precision=precision)
    agreement = compare(backend, cases, exact=False).agreement
    assert backend.description.precision == precision
    assert set(agreement) == set(exact.description.outputs)
    assert all(value < 1 - 1e-5 for value in agreement.values()), agreement
    if precision != "int4":
        relative = ("sparse", "scores") if kind == "bge-m3" or precision == "int8" else ()
        assert all(value > 0.5 for name, value in agreement.items() if name not in relative), agreement
