"""Torch runs a model in a process of its own."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest
from sentence_transformers import SentenceTransformer

from emb_model_provider.artifacts.torch_process import COMMAND, TorchProcess
from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.errors import InferenceError, LoadError, OperationCancelledError
from emb_model_provider.progress import CancelToken
from tests.backends.test_routes import two_transformers
from tests.models import FAMILIES, bundled_directory, snapshot_of, spec_of

if TYPE_CHECKING:
    from pathlib import Path

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
