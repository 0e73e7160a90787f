"""Computes the results of the reference: sentence-transformers at fp32 or, for BGE-M3, the formulas of FlagEmbedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers import CrossEncoder, MultiVectorEncoder, SentenceTransformer, SparseEncoder

from emb_model_provider.backends.base import Outputs, SparseVector
from emb_model_provider.backends.pytorch.heads import BgeM3Heads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sentence_transformers.base.model import BaseModel

    from emb_model_provider.backends.base import ModelDescription
    from emb_model_provider.backends.pytorch.heads import Served
    from emb_model_provider.fidelity.cases import Compute, Texts

_SEVERAL, _BATCH = 16, 8
"""More texts than this are computed in batches, because fewer are long ones."""


def reference_of(pipeline: BaseModel, served: Served, description: ModelDescription) -> Compute:
    """Return a function that computes all outputs of a model with the loaded pipeline, not with its served form."""

    def compute(texts: Texts, prompt: str, task: str | None) -> Outputs:
        options: dict[str, Any] = {
            "batch_size": _BATCH if len(texts) > _SEVERAL else 1,
            "show_progress_bar": False,
            "prompt": prompt,
        }
        match pipeline:
            case CrossEncoder():
                return _scores(pipeline, texts, options)
            case SparseEncoder():
                return Outputs(sparse=_sparse(pipeline, texts, options))  # type: ignore[arg-type]  # not pairs
            case MultiVectorEncoder():
                vectors = pipeline.encode(list(texts), task=task, convert_to_numpy=True, **options)
                return Outputs(multi_vector=[np.asarray(each, dtype=np.float32) for each in vectors])
            case SentenceTransformer():
                dense = pipeline.encode(list(texts), convert_to_numpy=True, normalize_embeddings=False, **options)
                vectors = np.asarray(dense, dtype=np.float32)
                if description.kind != "bge-m3":
                    return Outputs(dense=vectors)
                sparse, tokens = _bge_m3(pipeline, served, description, texts, prompt)  # type: ignore[arg-type]  # likewise
                return Outputs(dense=vectors, sparse=sparse, multi_vector=tokens)
        raise TypeError(f"{type(pipeline).__name__} has no reference")

    return compute


def _scores(pipeline: CrossEncoder, texts: Texts, options: dict[str, Any]) -> Outputs:
    if isinstance(texts[0], str):
        return Outputs(scores=_scores_of_texts(pipeline, list(texts), options["batch_size"]))  # type: ignore[arg-type]  # not pairs
    if not options["prompt"]:
        del options["prompt"]  # the default prompt of the model
    if "message" not in getattr(pipeline[0], "modality_config", {}):
        # Only the document is cut here; by default, sentence-transformers cuts the longer one of the two texts.
        options["processing_kwargs"] = {"text": {"truncation": "only_second"}}
    scores = pipeline.predict(list(texts), activation_fn=torch.nn.Identity(), convert_to_numpy=True, **options)  # type: ignore[arg-type]  # pairs
    return Outputs(scores=np.asarray(scores, dtype=np.float32).reshape(len(texts), -1))


@torch.inference_mode()
def _scores_of_texts(pipeline: CrossEncoder, texts: list[str], batch_size: int) -> np.ndarray[Any, Any]:
    rows = []
    for start in range(0, len(texts), batch_size):
        features = pipeline.preprocess(texts[start : start + batch_size])
        rows.append(pipeline(features)["scores"].float().cpu().numpy())
    return np.concatenate(rows)


def _sparse(pipeline: SparseEncoder, texts: Sequence[str], options: dict[str, Any]) -> list[SparseVector]:
    vectors = []
    for start in range(0, len(texts), _SEVERAL):  # all texts at once would take a row of the vocabulary each
        rows = pipeline.encode(
            list(texts[start : start + _SEVERAL]), convert_to_tensor=True, convert_to_sparse_tensor=False, **options
        )
        for row in np.asarray(rows, dtype=np.float32):
            indices = np.flatnonzero(row).astype(np.int32)
            vectors.append(SparseVector(indices, row[indices]))
    return vectors


@torch.inference_mode()
def _bge_m3(
    pipeline: SentenceTransformer, served: Served, description: ModelDescription, texts: Sequence[str], prompt: str
) -> tuple[list[SparseVector], list[np.ndarray[Any, Any]]]:
    """Compute sparse and multi-vector embeddings text by text, as FlagEmbedding's M3 embedder does."""
    heads = next(module for module in served.pipeline if isinstance(module, BgeM3Heads))
    rules = description.token_rules
    unused = set(rules.unweighted_ids) if rules is not None else set()
    sparse, multi_vector = [], []
    for text in texts:
        features = pipeline[0](pipeline.preprocess([text], prompt=prompt))
        hidden, ids = features["token_embeddings"][0], features["input_ids"][0].tolist()
        weights: dict[int, float] = {}
        for token, weight in zip(ids, torch.relu(heads.sparse(hidden))[:, 0].tolist(), strict=True):
            if token not in unused and weight > weights.get(token, 0.0):
                weights[token] = weight
        order = sorted(weights)
        sparse.append(
            SparseVector(np.array(order, dtype=np.int32), np.array([weights[each] for each in order], dtype=np.float32))
        )
        vectors = heads.vectors(hidden[1:])
        multi_vector.append(torch.nn.functional.normalize(vectors, dim=-1).float().cpu().numpy())
    return sparse, multi_vector
