"""Running the torch backend beside sentence-transformers, and comparing vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.backends.tokenization import Tokenization

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer

    from emb_model_provider.backends.base import Backend

TEXTS = [
    "a",
    "hello world",
    "The quick brown fox jumps over the lazy dog.",
    "How do I reset my password? 😀",
    "今天天气很好，我们去公园散步。",
    "向量检索 mixed with English words",
    "🚀🎉👍🏽😂",
    "",
    "   \n\t ",
    "nul\0inside",
    "Embedding models turn text into vectors that can be compared. " * 12,
    "如何重置我的密码？" * 40,
    "x" * 700,
]
"""From one token to several times the maximum length; Chinese, emoji, empty, blank and odd."""


def reference(directory: Path, **options: Any) -> SentenceTransformer:
    """Return sentence-transformers' own reading of a directory, in fp32 on the CPU."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(
        str(directory), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}, **options
    )


def embed_texts(backend: Backend, texts: Sequence[str], *, prompt: str | None = None) -> NDArray[np.float32]:
    """Tokenize, embed in one batch and normalize, as serving does; `prompt` None is the model's default."""
    description = backend.description
    if prompt is None:
        prompt = description.prompts[description.default_prompt] if description.default_prompt else ""
    encoded = Tokenization(description).encode(texts, prompt=prompt, truncate="END")
    vectors = backend.embed(TokenBatch(ids=encoded.ids, prompt_lengths=encoded.prompt_lengths))
    if description.normalize:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors


def spread(vectors: NDArray[np.float32]) -> float:
    """Return the highest cosine between two rows: near 1, a comparison of these vectors proves nothing."""
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return float(np.max(units @ units.T - 2 * np.eye(len(units))))


def cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the cosine of each row of `left` with the same row of `right`."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    products: NDArray[np.float64] = (a * b).sum(axis=1)
    return products / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
