"""Packing: batches whose inputs are concatenated in one row instead of padded. Each input attends to itself only.

PyTorch's fastest attention kernels support no padding mask. Only families that are known to work are packed, and only
if packed and padded vectors agree for this model on this device. A packed batch has at most as many tokens as the padded
one that the batcher planned, and the memory for attention grows linearly with them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers import AttentionInterface

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from sentence_transformers.base.model import BaseModel

Kernel = Callable[..., torch.Tensor]
"""Computes attention over concatenated inputs. Parameters and result are those of `varlen_kernel`."""

FAMILIES = frozenset(
    {
        "bert",
        "camembert",
        "distilbert",
        "gemma3_text",
        "llama",
        "mistral",
        "modernbert",
        "qwen2",
        "qwen3",
        "roberta",
        "xlm-roberta",
    }
)
"""`model_type` of families whose `forward` accepts position ids and passes keyword arguments to attention. Families with
relative position biases (MPNet, DeBERTa, T5) are padded, because the kernels do not support these."""

PROBES = (
    "a",
    "How do I reset my password?",
    "今天天气很好，我们去公园散步。",
    "Как восстановить пароль?",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "Embedding models turn text into vectors that can be compared. " * 40,
)
"""Texts of one to several hundred tokens, for comparing packed with padded vectors."""

_ATTENTION = "emb_model_provider_varlen"
_NAMES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_TOLERANCE = 1e-4
_NOISE_FACTOR = 3.0
_MAX_TOLERANCE = 0.01
_MAX_HEAD_WIDTH = 256


def varlen_kernel(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    longest: int,
    *,
    scale: float,
    window: tuple[int, int],
) -> torch.Tensor:
    """Compute attention with PyTorch's kernels for variable lengths (cuDNN or flash attention).

    Args:
        query: Shape (tokens, heads, head width).
        key: Like `query`, possibly with fewer heads, each shared by a group of the query's heads.
        value: Like `key`.
        starts: int32 of shape (inputs + 1): the start of each input, and the end of the last one.
        longest: Number of tokens of the longest input.
        scale: Factor of the products of queries and keys.
        window: Number of tokens to the left and right that a token attends to; -1 for all.

    Returns:
        Shape (tokens, heads, head width).
    """
    from torch.nn.attention.varlen import varlen_attn

    width = query.shape[-1]
    # The head width must be a multiple of 8. Zeros change no product, and the padding of the result is removed.
    if missing := -width % 8:
        query, key, value = (torch.nn.functional.pad(x, (0, missing)) for x in (query, key, value))
    out: Any = varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(), starts, starts, longest, longest,
        scale=scale, window_size=window, enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip
    attended: torch.Tensor = out
    return attended[..., :width]


def varlen_available(device: torch.device) -> bool:
    """Return whether this PyTorch version and this device support `varlen_kernel`."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 8:
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    # Versions without these parameters have another one for causal masks.
    return {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


def packable(pipeline: BaseModel) -> bool:
    """Return whether all modules of a pipeline support packed rows: a known family, Pooling, then Dense and Normalize."""
    if len(pipeline) < 2 or not isinstance(pipeline[0], Transformer) or not isinstance(pipeline[1], Pooling):
        return False
    first: Any = pipeline[0]
    text = getattr(first, "modality_config", {}).get("text", {})
    if text.get("method") != "forward" or text.get("method_output_name") != "last_hidden_state":
        return False
    for module in list(pipeline)[2:]:
        if not isinstance(module, Dense | Normalize) or module.module_input_name != "sentence_embedding":
            return False
    model: Any = first.model
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        config.model_type in FAMILIES
        # A repository can have its own class with the name of a family.
        and type(model).__module__.startswith("transformers.models.")
        and width <= _MAX_HEAD_WIDTH
        and not getattr(config, "is_decoder", False)
    )


class Packing:
    """Makes packed rows for one pipeline, and replaces its attention."""

    def __init__(self, pipeline: BaseModel, kernel: Kernel) -> None:
        """Replace the attention of a `packable` pipeline, which then accepts packed rows only."""
        first: Any = pipeline[0]
        self._padding_idx = _padding_idx(first.model)
        self._original_attention = str(first.model.config._attn_implementation)
        name = _ATTENTION if kernel is varlen_kernel else f"{_ATTENTION}_{id(kernel)}"
        AttentionInterface.register(name, _attention_function(kernel))
        # transformers makes no masks for a name without a mask function, and none are needed.
        first.model.set_attn_implementation(name)

    def undo(self, pipeline: BaseModel) -> None:
        """Restore the original attention of the pipeline, or of a copy of it, for padded rows."""
        first: Any = pipeline[0]
        first.model.set_attn_implementation(self._original_attention)

    def features(self, ids: Sequence[Sequence[int]], tokens: torch.Tensor) -> dict[str, Any]:
        """Return the features that the pipeline reads, of shape (1, tokens).

        Args:
            ids: The token ids of each input.
            tokens: The same ids, concatenated, on the device of the pipeline.
        """
        lengths = np.array([len(row) for row in ids], dtype=np.int64)
        starts = np.zeros(len(ids) + 1, dtype=np.int32)
        np.cumsum(lengths, out=starts[1:])
        device, longest = tokens.device, int(lengths.max())
        on_device = torch.from_numpy(starts).to(device)
        owners = np.repeat(np.arange(len(ids), dtype=np.int32), lengths)
        return {
            "input_ids": tokens.unsqueeze(0),
            "position_ids": torch.from_numpy(self._positions(ids)).to(device).unsqueeze(0),
            "seq_idx": torch.from_numpy(owners).to(device).unsqueeze(0),
            **dict(zip(_NAMES, (on_device, on_device, longest, longest), strict=True)),
        }

    def _positions(self, ids: Sequence[Sequence[int]]) -> NDArray[np.int64]:
        if self._padding_idx is None:
            return np.concatenate([np.arange(len(row), dtype=np.int64) for row in ids])
        # The RoBERTa family counts from padding_idx + 1, and does not count padding tokens, not even within a text.
        rows = [np.asarray(row) != self._padding_idx for row in ids]
        counted = [np.cumsum(real) * real + self._padding_idx for real in rows]
        return np.concatenate(counted).astype(np.int64)


def disagreement(packed: NDArray[np.float32], padded: NDArray[np.float32], alone: NDArray[np.float32]) -> str | None:
    """Return how packed vectors differ from padded ones, or None if the difference is acceptable.

    At half precision vectors depend slightly on the shape of the batch, so the tolerance for packing is derived from
    the difference between inputs that are padded and those that are embedded alone.
    """
    noise = 1 - _lowest_cosine(padded, alone)
    allowed = min(max(_TOLERANCE, _NOISE_FACTOR * noise), _MAX_TOLERANCE)
    # Both are compared, because an agreement with one of them can be a coincidence.
    difference = 1 - min(_lowest_cosine(packed, padded), _lowest_cosine(packed, alone))
    if difference <= allowed:
        return None
    return f"cosine {1 - difference:.6f}, and {1 - allowed:.6f} is required"


def _lowest_cosine(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    a, b = left.astype(np.float64), right.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = (a * b).sum(axis=1) / np.maximum(lengths, 1e-30)
    # A vector that is not finite differs from all others.
    return float(np.nan_to_num(cosines, nan=-1.0).min())


def _padding_idx(model: torch.nn.Module) -> int | None:
    """Return the padding id from which the RoBERTa family counts positions, or None for other models."""
    for module in model.modules():
        padding_idx = getattr(module, "padding_idx", None)
        if isinstance(padding_idx, int) and isinstance(
            getattr(module, "position_embeddings", None), torch.nn.Embedding
        ):
            return padding_idx
    return None


def _attention_function(kernel: Kernel) -> Callable[..., tuple[torch.Tensor, None]]:
    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int | None = None,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        """Map (1, heads, tokens, width) to (1, tokens, heads, width), as transformers requires."""
        if cu_seq_lens_q is None or max_length_q is None or attention_mask is not None or softcap is not None:
            raise ValueError("packed attention requires packed rows, and supports neither a mask nor a soft cap")
        causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", False))
        # The window of transformers includes the token itself.
        reach = -1 if sliding_window is None else sliding_window - 1
        attended = kernel(
            query.squeeze(0).transpose(0, 1),
            key.squeeze(0).transpose(0, 1),
            value.squeeze(0).transpose(0, 1),
            cu_seq_lens_q,
            max_length_q,
            scale=scaling if scaling is not None else query.shape[-1] ** -0.5,
            window=(reach, 0 if causal else reach),
        )
        return attended.unsqueeze(0), None

    return attention
