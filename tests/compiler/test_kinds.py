"""Compiled models of other kinds than dense embeddings equal the library that defines their results."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.artifacts.manifest import GRAPH, read_artifact
from emb_model_provider.backends.arrays import finite_rows
from emb_model_provider.backends.openvino_cpu.backend import OpenVinoBackend
from emb_model_provider.fidelity.cases import Runner
from tests import kind_checks
from tests.artifacts.helpers import compile_here
from tests.kind_checks import DOCUMENTS, PAIRS
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

if TYPE_CHECKING:
    from pathlib import Path

FAST = "bert"
"""The reranker that is compiled in each test run. The others are compiled with `-m slow`."""


def compiled(directory: Path, **options: Any) -> OpenVinoBackend:
    """Compile a model, by default at fp32, and load it from its artifact."""
    target = directory.with_name("artifact")
    result, _ = compile_here(directory, target, **{"precision": "fp32", **options})
    assert result.outcome == "done", result.reason
    artifact = read_artifact(target)
    assert artifact is not None
    return OpenVinoBackend(target / GRAPH, artifact.description, cpus=2)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == FAST else pytest.mark.slow) for name in RERANKERS]
)
def test_reranker(name: str, tmp_path: Path) -> None:
    """Its logits are equal within 0.001, and its fidelity says so."""
    directory = RERANKERS[name](tmp_path / "model")
    backend = compiled(directory)
    assert backend.description.has_token_types == (name == "bert")
    kind_checks.check_reranker(directory, backend)
    fidelity = backend.description.fidelity
    assert fidelity is not None
    assert fidelity.min_cosine is None
    assert fidelity.scores is not None
    assert fidelity.scores.max_difference < kind_checks.TOLERANCE
    assert fidelity.scores.agreement > 0.999


@pytest.mark.slow
def test_bare_qwen3_reranker(tmp_path: Path) -> None:
    directory = save_bare_qwen3_reranker(tmp_path / "model")
    kind_checks.check_bare_qwen3_reranker(directory, compiled(directory, kind="reranker"))


@pytest.mark.slow
@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier(name: str, tmp_path: Path) -> None:
    directory = CLASSIFIERS[name](tmp_path / "model")
    kind_checks.check_classifier(directory, compiled(directory))


@pytest.mark.slow
@pytest.mark.parametrize("name", SPARSE)
def test_sparse(name: str, tmp_path: Path) -> None:
    directory = SPARSE[name](tmp_path / "model")
    backend = compiled(directory)
    kind_checks.check_sparse(directory, backend)
    assert backend.description.fidelity is not None
    assert backend.description.fidelity.sparse is not None
    assert backend.description.fidelity.sparse.agreement > 0.999


@pytest.mark.slow
def test_inference_free_sparse(tmp_path: Path) -> None:
    """Both routes are compiled, so that queries need no torch either."""
    directory = save_inference_free_splade(tmp_path / "model")
    for task in ("query", "document"):
        kind_checks.check_sparse(directory, compiled(directory, route=task), task)


@pytest.mark.slow
@pytest.mark.parametrize("name", MULTI_VECTOR)
def test_multi_vector(name: str, tmp_path: Path) -> None:
    directory = MULTI_VECTOR[name](tmp_path / "model")
    backend = compiled(directory)
    kind_checks.check_multi_vector(directory, backend)
    assert backend.description.fidelity is not None
    assert backend.description.fidelity.multi_vector is not None
    assert backend.description.fidelity.multi_vector.agreement > 0.999


@pytest.mark.slow
def test_bge_m3(tmp_path: Path) -> None:
    """Its three outputs are those of one graph, and each has its fidelity."""
    directory = save_bge_m3(tmp_path / "model")
    backend = compiled(directory)
    kind_checks.check_bge_m3(directory, backend)
    assert backend.description.fidelity is not None
    assert set(backend.description.fidelity.agreement) == {"dense", "sparse", "multi_vector"}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("kind", ONE_OF_EACH)
def test_quantized_weights(kind: str, precision: str, tmp_path: Path) -> None:
    """Each output is measured, so that its floor applies. Weights without redundancy lose more than trained ones."""
    directory = ONE_OF_EACH[kind](tmp_path / "model")
    backend = compiled(directory, precision=precision)
    fidelity = backend.description.fidelity
    assert backend.description.precision == precision
    assert fidelity is not None
    assert set(fidelity.agreement) == set(backend.description.outputs)
    assert all(value < 1 for value in fidelity.agreement.values())
    if precision == "int8":
        agreement = dict(fidelity.agreement)
        if fidelity.sparse is not None:
            # All weights of a text can be almost 0 in such a model, so that any error is large relative to them.
            agreement["sparse"] = fidelity.sparse.term_overlap
        assert min(agreement.values()) > 0.2
    texts = PAIRS if backend.description.kind == "reranker" else DOCUMENTS
    assert finite_rows(Runner(backend)(texts), len(texts)).all()
