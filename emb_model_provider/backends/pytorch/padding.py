"""Models whose vectors depend on padding, although the attention mask hides it.

They mix neighboring tokens without a mask: by a convolution (ConvBERT), by an embedding of three tokens (MobileBERT), by a
Fourier transform (FNet), or by landmarks (Nyströmformer). In sentence-transformers, the vector of a text then depends on the
other texts of its batch. Here only texts of the same length are in one batch, so that each has the vector that it has alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from emb_model_provider.backends.base import pad
from emb_model_provider.backends.pytorch.packing import PROBES
from emb_model_provider.backends.tokenization import Tokenization

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from emb_model_provider.backends.base import ModelDescription

NOTE = "only inputs of the same length are in one batch, because the vectors of this model depend on padding"
_TYPES = frozenset({"convbert", "fnet", "mobilebert", "nystromformer"})
_MIN_COSINE = 0.9999
_TOKENS = 64
"""Longest text of the comparison in tokens, so that it takes less than a second."""


def depends_on_padding(pipeline: SentenceTransformer, description: ModelDescription) -> bool:
    """Return whether the vectors of a loaded pipeline depend on padding, by its type or, at fp32, by a comparison."""
    model = pipeline.transformers_model
    if model is None or isinstance(pipeline[0], StaticEmbedding):
        return False
    if model.config.model_type in _TYPES:
        return True
    if any(parameter.dtype != torch.float32 for parameter in pipeline.parameters()):
        return False  # rounding depends on the shape of a batch
    rows = Tokenization(description).encode(PROBES, max_tokens=_TOKENS).ids
    ids = [row for row in rows if max(row) < description.vocab_size]  # a tokenizer can have more ids than the model
    if not ids:
        return False
    longest = max(map(len, ids))
    padded = _run(pipeline, description, ids, longest)
    alone = np.concatenate([_run(pipeline, description, [row], len(row)) for row in ids])
    norms = np.linalg.norm(padded, axis=1) * np.linalg.norm(alone, axis=1)
    cosines = (padded * alone).sum(axis=1) / np.maximum(norms, 1e-30)
    return bool((cosines < _MIN_COSINE).any())


@torch.inference_mode()
def _run(pipeline: SentenceTransformer, description: ModelDescription, ids: list[list[int]], length: int) -> Any:
    tokens, mask = pad(ids, length, description.pad_token_id, description.padding_side)
    features = {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(mask)}
    placed = {name: value.to(pipeline.device) for name, value in features.items()}
    return pipeline(placed)["sentence_embedding"].double().cpu().numpy()
