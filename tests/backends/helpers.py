"""Texts, descriptions and loaded models, and comparisons with sentence-transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer

from emb_model_provider.backends.base import ModelDescription, TokenBatch
from emb_model_provider.backends.pipeline_plan import plan_pipeline
from emb_model_provider.backends.pytorch.backend import TorchBackend
from emb_model_provider.backends.pytorch.pipeline import load_pipeline
from emb_model_provider.backends.tokenization import Tokenization
from tests.backends.small_tokenizers import LENGTH, byte_bpe, unigram, wordpiece
from tests.models import bundled_directory, snapshot_of, spec_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedTokenizerFast

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
"""From one token to several times the maximum length: Chinese, emoji, empty, blank and unusual texts."""
DISTINCT = [0, 1, 2, 3, 4, 5, 10, 11]
"""Indexes of texts whose vectors must differ, because otherwise a comparison proves nothing."""

TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "wordpiece": wordpiece,
    "unigram": unigram,
    "byte-bpe": byte_bpe,
    "closing token only": lambda: byte_bpe(around=("", "<|endoftext|>")),
    "no special tokens": lambda: byte_bpe(around=("", "")),
}


def description(tokenizer: PreTrainedTokenizerFast | None = None, **changes: Any) -> ModelDescription:
    """Return the description of a small model, by default with a WordPiece tokenizer."""
    tokenizer = tokenizer or wordpiece()
    values: dict[str, Any] = {
        "dimension": 8,
        "max_length": LENGTH,
        "vocab_size": len(tokenizer),
        "tokenizer_json": tokenizer.backend_tokenizer.to_str(),
        "pad_token_id": tokenizer.pad_token_id,
        "padding_side": "right",
        "normalize": True,
        "pooling": "mean",
        "prompts": {},
        "default_prompt": None,
        "excludes_prompt": False,
        "matryoshka": None,
        "precision": "fp32",
        "device": "cpu",
        "backend": "torch",
    }
    return ModelDescription(**{**values, **changes})


def bundled_description() -> ModelDescription:
    """Return the description of the bundled model, without loading it."""
    tokenizer = Tokenizer.from_file(str(bundled_directory() / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return description(tokenizer_json=tokenizer.to_str(), vocab_size=30_522, max_length=256, dimension=384)


def tokenization_of(tokenizer: PreTrainedTokenizerFast, **changes: Any) -> Tokenization:
    return Tokenization(description(tokenizer, **changes))


def load_torch(directory: Path, *, trust: bool = False, **spec: Any) -> TorchBackend:
    """Load a directory with the torch backend, by default on the CPU."""
    return TorchBackend(spec_of(**spec), snapshot_of(directory), trust_remote_code=trust)


def load_torch_pipeline(directory: Path, *, device: str = "cpu") -> SentenceTransformer:
    """Load the pipeline that the torch backend runs, at fp32."""
    snapshot = snapshot_of(directory)
    plan = plan_pipeline(spec_of(), snapshot, trust_remote_code=False)
    return load_pipeline(plan, snapshot, precision="fp32", device=device, trust_remote_code=False)[0]


def reference(directory: Path, **options: Any) -> SentenceTransformer:
    """Load a directory with sentence-transformers, at fp32 on the CPU."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(
        str(directory), device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32}, **options
    )


def embed_texts(backend: Backend, texts: Sequence[str], *, prompt: str | None = None) -> NDArray[np.float32]:
    """Tokenize, embed in one batch and normalize, as serving does.

    Args:
        backend: The model.
        texts: The inputs.
        prompt: A text to put before each input; None for the default prompt of the model.
    """
    described = backend.description
    if prompt is None:
        prompt = described.prompts[described.default_prompt] if described.default_prompt else ""
    encoded = Tokenization(described).encode(texts, prompt=prompt)
    vectors = backend.run(TokenBatch(ids=encoded.ids, prompt_lengths=encoded.prompt_lengths)).dense
    if described.normalize:
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return vectors


def highest_similarity(vectors: NDArray[np.float32]) -> float:
    """Return the highest cosine between two different rows. If it is near 1, comparing the vectors proves nothing."""
    units = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return float(np.max(units @ units.T - 2 * np.eye(len(units))))


def cosines(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the cosine of each row of `left` to the same row of `right`."""
    a, b = left.astype(np.float64), right.astype(np.float64)
    products: NDArray[np.float64] = (a * b).sum(axis=1)
    return products / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def assert_same(
    ours: NDArray[np.float32], theirs: NDArray[np.float32], *, min_cosine: float = 0.99999, norm_tolerance: float = 1e-4
) -> None:
    """Assert that vectors have the same shape, directions and norms."""
    assert ours.shape == theirs.shape
    assert ours.dtype == np.float32
    assert cosines(ours, theirs).min() >= min_cosine
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1), rtol=norm_tolerance)


def reference_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    *,
    scale: float,
    window: tuple[int, int],
) -> torch.Tensor:
    """Compute attention input by input, as `varlen_kernel` specifies it: slow, exact, and on any device."""
    assert starts.dtype == torch.int32
    rows = []
    for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        assert end - start <= longest
        positions = torch.arange(end - start)
        back = positions[:, None] - positions[None, :]
        left, right = (float("inf") if side < 0 else side for side in window)
        q, k, v = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (query, key, value))
        attended = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=(back <= left) & (-back <= right), scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        rows.append(attended.squeeze(0).transpose(0, 1))
    return torch.cat(rows)
