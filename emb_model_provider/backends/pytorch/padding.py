"""Models whose vectors depend on padding, although the attention mask hides it.

They mix neighboring tokens without a mask: by a convolution (ConvBERT), by an embedding of three tokens (MobileBERT), by a
Fourier transform (FNet), or by landmarks (Nyströmformer). In sentence-transformers, the vector of a text then depends on the
other texts of its batch. Here only texts of the same length are in one batch, so that each has the vector that it has alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from emb_model_provider.backends.arrays import OutputBuilder, pad_inputs
from emb_model_provider.backends.base import POOLING_MASK, SparseVector
from emb_model_provider.backends.pytorch.heads import run_pipeline
from emb_model_provider.backends.pytorch.packing import PROBES
from emb_model_provider.backends.tokenization import Tokenization

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from sentence_transformers.base.model import BaseModel

    from emb_model_provider.backends.base import ModelDescription, Row, TokenBatch

NOTE = "only inputs of the same length are in one batch, because the vectors of this model depend on padding"
_TYPES = frozenset({"convbert", "fnet", "mobilebert", "nystromformer"})
_TOLERANCE = 0.014
"""Largest difference, relative to the length of a vector: a cosine of 0.9999."""
_TOKENS = 64
"""Longest text of the comparison in tokens, so that it takes less than a second."""


def depends_on_padding(pipeline: BaseModel, description: ModelDescription) -> bool:
    """Return whether the vectors of a loaded pipeline depend on padding, by its type or, at fp32, by a comparison."""
    model = pipeline.transformers_model
    if model is None or isinstance(pipeline[0], StaticEmbedding):
        return False
    if model.config.model_type in _TYPES:
        return True
    if any(parameter.dtype != torch.float32 for parameter in pipeline.parameters()):
        return False  # rounding depends on the shape of a batch
    encoded = Tokenization(description).encode(PROBES, max_tokens=_TOKENS).batch()
    # A tokenizer can have more ids than the model.
    rows = [row for row, ids in enumerate(encoded.ids) if max(ids) < description.vocab_size]
    if not rows:
        return False
    batch = encoded.select(rows)
    every = range(len(rows))
    padded = _run(pipeline, description, batch, every)
    alone = [_run(pipeline, description, batch, [row])[0] for row in every]
    return any(
        np.linalg.norm(ours - theirs) > _TOLERANCE * np.linalg.norm(theirs)
        for ours, theirs in zip(padded, alone, strict=True)
    )


@torch.inference_mode()
def _run(
    pipeline: BaseModel, description: ModelDescription, batch: TokenBatch, rows: Sequence[int]
) -> list[NDArray[np.float64]]:
    """Return the results of some inputs, each as one vector."""
    arrays = pad_inputs(batch, rows, max(len(batch.ids[row]) for row in rows), description)
    arrays.pop(POOLING_MASK, None)
    features = {name: torch.from_numpy(array).to(pipeline.device) for name, array in arrays.items()}
    results = run_pipeline(pipeline, features, description.arrays)
    builder = OutputBuilder(batch.select(rows), description)
    builder.add(range(len(rows)), {name: array.float().cpu().numpy() for name, array in results.items()})
    outputs = builder.build()
    return [_flat(outputs.row(row, description.outputs)[0], description) for row in range(len(rows))]


def _flat(row: Row, description: ModelDescription) -> NDArray[np.float64]:
    if isinstance(row, SparseVector):
        flat = np.zeros(description.dimension)
        flat[row.indices] = row.values
        return flat
    return np.asarray(row, dtype=np.float64).reshape(-1)
