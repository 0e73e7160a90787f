"""Compares a backend of any kind with the library that defines its results, in batches and input by input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from emb_model_provider.backends.base import Outputs, SparseVector
from emb_model_provider.fidelity.cases import Runner
from tests.backends.helpers import TEXTS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from emb_model_provider.backends.base import Backend

QUERY = "how do I reset it?"
DOCUMENTS = [*TEXTS[:7], "Open the settings and choose reset. ", "short", "password " * 5]
PAIRS = [(QUERY, text) for text in DOCUMENTS] + [("another query", "a document")]
TOLERANCE = 1e-3
"""Largest difference of a logit at fp32."""


def runs(backend: Backend, texts: Sequence[Any], task: str | None = None, prompt: str = "") -> list[Outputs]:
    """Return the outputs for texts or pairs: in one batch of mixed lengths, and each alone."""
    run = Runner(backend)
    return [run(texts, prompt, task, batch_size=size) for size in (len(texts), 1)]


# --- what the libraries compute, each input alone -------------------------------------------------------


def expected_scores(directory: Path, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """Return the logits of a reranker, shape (pairs, 1). Only documents are cut."""
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(directory), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32})
    options: dict[str, Any] = {}
    if "message" not in model[0].modality_config:
        options["processing_kwargs"] = {"text": {"truncation": "only_second"}}
    scores = model.predict(
        list(pairs), batch_size=1, activation_fn=torch.nn.Identity(), show_progress_bar=False, **options
    )
    return np.asarray(scores).reshape(len(pairs), -1)


def expected_qwen3_scores(
    directory: Path, pairs: Sequence[tuple[str, str]], *, instruction: str = "", max_length: int
) -> np.ndarray:
    """Return the logits of a bare Qwen3-Reranker with the code of its model card, which uses transformers only."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, local_files_only=True).eval()
    prefix = (
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    )
    suffix = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    before, after = (tokenizer.encode(text, add_special_tokens=False) for text in (prefix, suffix))
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    task = instruction or "Given a web search query, retrieve relevant passages that answer the query"
    scores = []
    for query, document in pairs:
        text = f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {document}"
        room = max_length - len(before) - len(after)
        ids = [*before, *tokenizer.encode(text, add_special_tokens=False)[:room], *after]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        scores.append((logits[yes] - logits[no]).item())
    return np.array(scores, dtype=np.float32).reshape(-1, 1)


def expected_labels(directory: Path, texts: Sequence[str]) -> np.ndarray:
    """Return the logits of a classifier, shape (texts, labels)."""
    from transformers import pipeline

    classify = pipeline(
        "text-classification", str(directory), device="cpu", top_k=None, function_to_apply="none", dtype=torch.float32
    )
    numbers = classify.model.config.label2id
    scores = np.empty((len(texts), len(numbers)), dtype=np.float32)
    for row, text in enumerate(texts):
        for found in classify([text], truncation=True)[0]:
            scores[row, numbers[found["label"]]] = found["score"]
    return scores


def expected_terms(directory: Path, texts: Sequence[str], task: str | None = None) -> np.ndarray:
    """Return the weights of a sparse model, shape (texts, vocabulary)."""
    from sentence_transformers import SparseEncoder

    model = SparseEncoder(str(directory), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32})
    encode = {None: model.encode, "query": model.encode_query, "document": model.encode_document}[task]
    weights = encode(list(texts), batch_size=1, convert_to_sparse_tensor=False, show_progress_bar=False)
    return np.asarray(weights.numpy())


def expected_token_vectors(directory: Path, texts: Sequence[str], task: str) -> list[np.ndarray]:
    """Return the vectors of a multi-vector model, each of shape (tokens, dimension)."""
    from sentence_transformers import MultiVectorEncoder

    model = MultiVectorEncoder(
        str(directory), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}
    )
    encode = {"query": model.encode_query, "document": model.encode_document}[task]
    return list(encode(list(texts), batch_size=1, convert_to_numpy=True, show_progress_bar=False))


def expected_bge_m3(directory: Path, texts: Sequence[str]) -> Outputs:
    """Return the three outputs of BGE-M3, by the formulas of FlagEmbedding. Its dense vectors are normalized."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    dense = model.encode(list(texts), batch_size=1, show_progress_bar=False)
    sparse_head, vector_head = (
        torch.load(directory / name, weights_only=True) for name in ("sparse_linear.pt", "colbert_linear.pt")
    )
    tokenizer = model.tokenizer
    special = {tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    sparse, multi_vector = [], []
    for text in texts:
        features = model.preprocess([text])
        with torch.no_grad():
            hidden = model[0](features)["token_embeddings"][0]
            weights = torch.relu(hidden @ sparse_head["weight"].T + sparse_head["bias"])[:, 0].tolist()
            vectors = (hidden @ vector_head["weight"].T + vector_head["bias"])[1:].numpy()
        lexical: dict[int, float] = {}
        for token, weight in zip(features["input_ids"][0].tolist(), weights, strict=True):
            if token not in special and weight > 0:
                lexical[token] = max(weight, lexical.get(token, 0.0))
        order = sorted(lexical)
        sparse.append(
            SparseVector(
                np.array(order, dtype=np.int32), np.array([lexical[token] for token in order], dtype=np.float32)
            )
        )
        multi_vector.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    return Outputs(dense=dense, sparse=sparse, multi_vector=multi_vector)


# --- comparisons ----------------------------------------------------------------------------------------


def check_reranker(directory: Path, backend: Backend) -> None:
    _compare_scores(expected_scores(directory, PAIRS), runs(backend, PAIRS))


def check_bare_qwen3_reranker(directory: Path, backend: Backend) -> None:
    """With the default instruction, and with another one."""
    limit = backend.description.max_length
    for instruction in ("", "Find the answer in the manual"):
        expected = expected_qwen3_scores(directory, PAIRS, instruction=instruction, max_length=limit)
        _compare_scores(expected, runs(backend, PAIRS, prompt=instruction))


def check_classifier(directory: Path, backend: Backend) -> None:
    _compare_scores(expected_labels(directory, DOCUMENTS), runs(backend, DOCUMENTS))


def check_sparse(directory: Path, backend: Backend, task: str | None = None) -> None:
    expected = expected_terms(directory, DOCUMENTS, task)
    assert (expected > 0).any(axis=1).sum() >= len(DOCUMENTS) - 2
    for outputs in runs(backend, DOCUMENTS, task):
        assert outputs.sparse is not None
        assert np.abs(densify(outputs.sparse, expected.shape[1]) - expected).max() < TOLERANCE


def check_multi_vector(directory: Path, backend: Backend) -> None:
    for task in ("query", "document"):
        expected = expected_token_vectors(directory, DOCUMENTS, task)
        for outputs in runs(backend, DOCUMENTS, task, backend.description.prompts.get(task, "")):
            assert outputs.multi_vector is not None
            _compare_token_vectors(expected, outputs.multi_vector)


def check_bge_m3(directory: Path, backend: Backend) -> None:
    expected = expected_bge_m3(directory, DOCUMENTS)
    assert expected.sparse is not None
    assert expected.multi_vector is not None
    for outputs in runs(backend, DOCUMENTS):
        assert outputs.dense is not None
        assert outputs.sparse is not None
        assert outputs.multi_vector is not None
        unit = outputs.dense / np.linalg.norm(outputs.dense, axis=1, keepdims=True)
        assert np.abs(unit - expected.dense).max() < TOLERANCE
        for ours, theirs in zip(outputs.sparse, expected.sparse, strict=True):
            assert ours.indices.tolist() == theirs.indices.tolist()
            assert np.allclose(ours.values, theirs.values, atol=TOLERANCE)
        _compare_token_vectors(expected.multi_vector, outputs.multi_vector)


def _compare_scores(expected: np.ndarray, runs: Sequence[Outputs]) -> None:
    assert np.ptp(expected) > 1, "all scores are nearly equal, so that a comparison proves nothing"
    for outputs in runs:
        assert outputs.scores is not None
        assert np.abs(outputs.scores - expected).max() < TOLERANCE


def _compare_token_vectors(expected: Sequence[np.ndarray], actual: Sequence[np.ndarray]) -> None:
    assert [each.shape for each in actual] == [each.shape for each in expected]
    for ours, theirs in zip(actual, expected, strict=True):
        assert np.abs(ours - theirs).max(initial=0) < TOLERANCE


def densify(vectors: Sequence[SparseVector], width: int) -> np.ndarray:
    dense = np.zeros((len(vectors), width), dtype=np.float32)
    for row, vector in enumerate(vectors):
        dense[row, vector.indices] = vector.values
    return dense
