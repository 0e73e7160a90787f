"""Torch runs a model in a process of its own."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest
from sentence_transformers import SentenceTransformer, SparseEncoder

from emb_model_provider.artifacts.torch_process import COMMAND, TorchProcess, arrays_of, outputs_of
from emb_model_provider.backends.base import Outputs, SparseVector, TokenBatch
from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.errors import InferenceError, LoadError, OperationCancelledError
from emb_model_provider.progress import CancelToken
from tests import kind_checks
from tests.backends.test_routes import two_transformers
from tests.kind_models import CLASSIFIERS, MULTI_VECTOR, RERANKERS, SPARSE, save_bge_m3, save_inference_free_splade
from tests.models import FAMILIES, bundled_directory, snapshot_of, spec_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.backends.base import Backend

TEXTS = ["how do I reset my password?", "天气", "word " * 300]
pytestmark = pytest.mark.slow


def start(directory: Path, cancel: CancelToken | None = None) -> TorchProcess:
    return TorchProcess(spec_of(), snapshot_of(directory), trust_remote_code=False, cancel=cancel or CancelToken())


def children() -> list[psutil.Process]:
    """Return the processes with torch that this one has started."""
    return [child for child in psutil.Process().children() if COMMAND[-1] in child.cmdline()]


def batch_of(backend: TorchProcess, texts: list[str]) -> TokenBatch:
    encoded = Tokenization(backend.description).encode(texts, truncate="END")
    return TokenBatch(ids=encoded.ids, prompt_lengths=encoded.prompt_lengths)


def test_vectors_are_those_of_sentence_transformers() -> None:
    """Also after a batch that fails. The process ends when the backend is closed, or with an error if it is killed."""
    backend = start(bundled_directory())
    (child,) = children()
    try:
        reference = SentenceTransformer(str(bundled_directory()), device="cpu", local_files_only=True)
        expected = reference.encode(TEXTS, normalize_embeddings=True)
        description = backend.description
        assert (description.precision, description.backend, description.is_interim) == ("fp32", "torch", True)
        for _ in range(2):
            vectors = backend.run(batch_of(backend, TEXTS)).dense
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
            assert (vectors * expected).sum(axis=1).min() > 0.99999
            with pytest.raises(InferenceError, match="token id"):
                backend.run(TokenBatch(ids=[[10**6]], prompt_lengths=[0]))
        assert backend.memory_bytes > 100_000_000
        child.kill()
        with pytest.raises(InferenceError, match="ended"):
            backend.run(batch_of(backend, TEXTS))
    finally:
        backend.close()
    assert not child.is_running()


def test_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    directory = FAMILIES["bert-mean-normalize"](tmp_path / "model")
    (directory / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(LoadError, match="torch cannot run it in a process of its own"):
        start(directory)
    assert children() == []


def test_cancelled_start_ends_the_process(tmp_path: Path) -> None:
    cancel = CancelToken()
    threading.Timer(0.5, cancel.cancel).start()
    with pytest.raises(OperationCancelledError):
        start(FAMILIES["bert-mean-normalize"](tmp_path / "model"), cancel)
    assert children() == []


def test_routes_of_an_asymmetric_model(tmp_path: Path) -> None:
    backend = start(two_transformers(tmp_path / "model"))
    try:
        ids = [[5, 6, 7]] * 2
        query, document = backend.run(TokenBatch(ids=ids, prompt_lengths=[0, 0], tasks=["query", "document"])).dense
        assert set(backend.description.routes) == {"query", "document"}
        assert not np.allclose(query, document)
    finally:
        backend.close()


KINDS: dict[str, tuple[Callable[[Path], Path], Callable[[Path, Backend], None]]] = {
    "reranker": (RERANKERS["bert"], kind_checks.check_reranker),
    "causal reranker": (RERANKERS["qwen3"], kind_checks.check_reranker),
    "classifier": (CLASSIFIERS["bert"], kind_checks.check_classifier),
    "sparse": (SPARSE["bert"], kind_checks.check_sparse),
    "multi-vector": (MULTI_VECTOR["Stanford"], kind_checks.check_multi_vector),
    "bge-m3": (save_bge_m3, kind_checks.check_bge_m3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_other_kinds_are_those_of_their_library(kind: str, tmp_path: Path) -> None:
    """Also ragged ones, whose rows have different numbers of terms or tokens."""
    save, check = KINDS[kind]
    directory = save(tmp_path / "model")
    backend = start(directory)
    try:
        check(directory, backend)
    finally:
        backend.close()


def test_some_of_several_outputs(tmp_path: Path) -> None:
    """Only those that a batch requests are sent."""
    backend = start(save_bge_m3(tmp_path / "model"))
    try:
        whole = backend.run(batch_of(backend, TEXTS))
        some = backend.run(replace(batch_of(backend, TEXTS), outputs=("sparse",)))
        assert (some.dense, some.multi_vector) == (None, None)
        assert [each.indices.tolist() for each in some.sparse] == [each.indices.tolist() for each in whole.sparse]
        assert len({len(each) for each in whole.multi_vector}) == len(TEXTS)
    finally:
        backend.close()


def test_rows_without_terms_or_tokens() -> None:
    """In any place, and if there are no others."""
    empty, some = (
        SparseVector(np.zeros(0, np.int32), np.zeros(0, np.float32)),
        SparseVector(np.array([3, 9], np.int32), np.array([1.5, 0.5], np.float32)),
    )
    none, tokens = np.zeros((0, 4), np.float32), np.ones((2, 4), np.float32)
    for rows in ([empty], [empty, some], [some, empty, empty, some]):
        result = outputs_of(arrays_of(Outputs(sparse=rows))).sparse
        assert [each.indices.tolist() for each in result] == [each.indices.tolist() for each in rows]
        assert [each.values.tolist() for each in result] == [each.values.tolist() for each in rows]
    for vectors in ([none], [none, tokens], [tokens, none, none, tokens]):
        parts = outputs_of(arrays_of(Outputs(multi_vector=vectors))).multi_vector
        assert [each.shape for each in parts] == [each.shape for each in vectors]


def test_routes_of_a_sparse_model(tmp_path: Path) -> None:
    """Queries have the weights of a table, documents those of a transformer."""
    directory = save_inference_free_splade(tmp_path / "model")
    model = SparseEncoder(str(directory), device="cpu", local_files_only=True)
    backend = start(directory)
    try:
        for task, encode in (("query", model.encode_query), ("document", model.encode_document)):
            expected = encode(TEXTS, convert_to_sparse_tensor=False, show_progress_bar=False).numpy()
            tokenization = Tokenization(backend.description.routes[task])
            result = backend.run(tokenization.encode(TEXTS, truncate="END", task=task).batch(task=task)).sparse
            dense = kind_checks.densify(result, expected.shape[1])
            assert np.abs(dense - expected).max() < kind_checks.TOLERANCE
    finally:
        backend.close()
