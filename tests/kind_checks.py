"""Compares a backend of any kind with the library that defines its results, in batches and input by input."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from emb_model_provider.fidelity.cases import Runner
from tests.backends.helpers import TEXTS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from emb_model_provider.backends.base import Backend, Outputs, SparseVector

QUERY = "how do I reset it?"
DOCUMENTS = [*TEXTS[:7], "Open the settings and choose reset. ", "short", "password " * 5]
PAIRS = [(QUERY, text) for text in DOCUMENTS] + [("another query", "a document")]
TOLERANCE = 1e-3
"""Largest difference of a logit at fp32."""


def runs(backend: Backend, texts: Sequence[Any], task: str | None = None, prompt: str = "") -> list[Outputs]:
    """Return the outputs for texts or pairs: in one batch of mixed lengths, and each alone."""
    run = Runner(backend)
    return [run(texts, prompt, task, batch_size=size) for size in (len(texts), 1)]


def check_reranker(directory: Path, backend: Backend) -> None:
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(str(directory), device="cpu", local_files_only=True)
    expected = model.predict(PAIRS, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    assert np.ptp(expected) > 1, "all scores are nearly equal, so that a comparison proves nothing"
    for outputs in runs(backend, PAIRS):
        assert outputs.scores is not None
        assert np.abs(outputs.scores[:, 0] - expected).max() < TOLERANCE


def check_bare_qwen3_reranker(directory: Path, backend: Backend) -> None:
    """Compare with the code of Qwen3-Reranker's model card, which uses transformers only."""
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
    for instruction in ("", "Find the answer in the manual"):
        task = instruction or "Given a web search query, retrieve relevant passages that answer the query"
        expected = []
        for query, document in PAIRS:
            text = f"<Instruct>: {task}\n<Query>: {query}\n<Document>: {document}"
            room = backend.description.max_length - len(before) - len(after)
            ids = [*before, *tokenizer.encode(text, add_special_tokens=False)[:room], *after]
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            expected.append((logits[yes] - logits[no]).item())
        assert np.ptp(expected) > 1, "all scores are nearly equal, so that a comparison proves nothing"
        for outputs in runs(backend, PAIRS, prompt=instruction):
            assert outputs.scores is not None
            assert np.abs(outputs.scores[:, 0] - expected).max() < TOLERANCE


def check_classifier(directory: Path, backend: Backend) -> None:
    from transformers import pipeline

    classify = pipeline("text-classification", str(directory), device="cpu", top_k=None, function_to_apply="none")
    for outputs in runs(backend, DOCUMENTS):
        assert outputs.scores is not None
        for scores, found in zip(outputs.scores, classify(DOCUMENTS, truncation=True), strict=True):
            by_label = {each["label"]: each["score"] for each in found}
            expected = [by_label[label] for label in backend.description.labels]
            assert np.abs(scores - expected).max() < TOLERANCE


def check_sparse(directory: Path, backend: Backend, task: str | None = None) -> None:
    from sentence_transformers import SparseEncoder

    model = SparseEncoder(str(directory), device="cpu", local_files_only=True)
    encode = {None: model.encode, "query": model.encode_query, "document": model.encode_document}[task]
    expected = encode(DOCUMENTS, convert_to_sparse_tensor=False, show_progress_bar=False).numpy()
    assert (expected > 0).any(axis=1).sum() >= len(DOCUMENTS) - 2
    for outputs in runs(backend, DOCUMENTS, task):
        assert outputs.sparse is not None
        assert np.abs(densify(outputs.sparse, expected.shape[1]) - expected).max() < TOLERANCE


def check_multi_vector(directory: Path, backend: Backend) -> None:
    from sentence_transformers import MultiVectorEncoder

    model = MultiVectorEncoder(str(directory), device="cpu", local_files_only=True)
    prompts = backend.description.prompts
    for task, encode in (("query", model.encode_query), ("document", model.encode_document)):
        expected = encode(DOCUMENTS, convert_to_numpy=True, show_progress_bar=False)
        for outputs in runs(backend, DOCUMENTS, task, prompts.get(task, "")):
            assert outputs.multi_vector is not None
            assert [each.shape for each in outputs.multi_vector] == [each.shape for each in expected]
            for ours, theirs in zip(outputs.multi_vector, expected, strict=True):
                assert np.abs(ours - theirs).max(initial=0) < TOLERANCE


def check_bge_m3(directory: Path, backend: Backend) -> None:
    """Compare with the formulas of FlagEmbedding, written again here, text by text."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(directory), device="cpu", local_files_only=True)
    dense = model.encode(DOCUMENTS, show_progress_bar=False)
    sparse_head, vector_head = (
        torch.load(directory / name, weights_only=True) for name in ("sparse_linear.pt", "colbert_linear.pt")
    )
    tokenizer = model.tokenizer
    special = {tokenizer.cls_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    for outputs in runs(backend, DOCUMENTS):
        assert outputs.dense is not None
        assert outputs.sparse is not None
        assert outputs.multi_vector is not None
        unit = outputs.dense / np.linalg.norm(outputs.dense, axis=1, keepdims=True)
        assert np.abs(unit - dense).max() < TOLERANCE
        for text, sparse, vectors in zip(DOCUMENTS, outputs.sparse, outputs.multi_vector, strict=True):
            features = model.preprocess([text])
            with torch.no_grad():
                hidden = model[0](features)["token_embeddings"][0]
                weights = torch.relu(hidden @ sparse_head["weight"].T + sparse_head["bias"])[:, 0].tolist()
                expected = (hidden @ vector_head["weight"].T + vector_head["bias"])[1:].numpy()
            lexical: dict[int, float] = {}
            for token, weight in zip(features["input_ids"][0].tolist(), weights, strict=True):
                if token not in special and weight > 0:
                    lexical[token] = max(weight, lexical.get(token, 0.0))
            assert sorted(lexical) == sparse.indices.tolist()
            assert np.allclose(sparse.values, [lexical[token] for token in sorted(lexical)], atol=TOLERANCE)
            expected /= np.linalg.norm(expected, axis=1, keepdims=True)
            assert np.abs(vectors - expected).max() < TOLERANCE


def densify(vectors: Sequence[SparseVector], width: int) -> np.ndarray:
    dense = np.zeros((len(vectors), width), dtype=np.float32)
    for row, vector in enumerate(vectors):
        dense[row, vector.indices] = vector.values
    return dense
