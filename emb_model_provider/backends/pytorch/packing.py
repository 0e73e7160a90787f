"""Packing: batches whose inputs are concatenated in one row instead of padded. Each input attends to itself only.

PyTorch's fastest attention kernels support no padding mask. Only families that are known to work are packed, and only
if packed and padded vectors agree for this model on this device. A packed batch has at most as many tokens as the padded
one that the batcher planned, and the memory for attention grows linearly with them.
"""

from __future__ import annotations

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
_FLASH_PARAMETERS = (
    "query", "key", "value", "cum_seq_q", "cum_seq_k", "max_q", "max_k", "dropout_p", "is_causal", "return_debug_mask"
)  # fmt: skip


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
    """Compute attention with PyTorch's flash attention for variable lengths.

    This is the operator under `torch.nn.attention.varlen.varlen_attn`, which in PyTorch 2.15 prefers cuDNN on Hopper and
    Blackwell. cuDNN makes a plan for every new number of tokens, which takes about 40 ms, and never frees it.

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
    width = query.shape[-1]
    # The head width must be a multiple of 8. Zeros change no product, and the padding of the result is removed.
    if missing := -width % 8:
        query, key, value = (torch.nn.functional.pad(x, (0, missing)) for x in (query, key, value))
    attended: torch.Tensor = torch.ops.aten._flash_attention_forward(
        query, key, value, starts, starts, longest, longest, 0.0, window == (-1, 0), False,
        scale=scale, window_size_left=window[0], window_size_right=window[1],
    )[0]  # fmt: skip
    return attended[..., :width]


def varlen_available(device: torch.device) -> bool:
    """Return whether this PyTorch version and this device support `varlen_kernel`."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 8:
        return False
    return torch.backends.cuda.is_flash_attention_available() and flash_operator_fits(
        torch.ops.aten._flash_attention_forward.default._schema
    )


def flash_operator_fits(schema: torch.FunctionSchema) -> bool:
    """Return whether the flash attention operator of a PyTorch version has the parameters that `varlen_kernel` passes."""
    names = [argument.name for argument in schema.arguments]
    return tuple(names[: len(_FLASH_PARAMETERS)]) == _FLASH_PARAMETERS and {
        "scale",
        "window_size_left",
        "window_size_right",
    } <= set(names)


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

    def features(self, ids: NDArray[np.int64], lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
        """Return the features that the pipeline reads, of shape (1, tokens), on a device.

        Args:
            ids: The token ids of all inputs, concatenated.
            lengths: Number of tokens of each input.
            device: The device of the pipeline.
        """
        starts = np.cumsum([0, *lengths])
        owners = np.repeat(np.arange(len(lengths)), lengths)
        tokens, positions, seq_idx, on_device = to_device(
            (ids, self._positions(ids, lengths, starts), owners, starts), device
        )
        longest = max(lengths)
        return {
            # Lookups accept int32, but some models gather with positions, which requires int64.
            "input_ids": tokens.long().unsqueeze(0),
            "position_ids": positions.long().unsqueeze(0),
            "seq_idx": seq_idx.unsqueeze(0),
            **dict(zip(_NAMES, (on_device, on_device, longest, longest), strict=True)),
        }

    def _positions(
        self, ids: NDArray[np.int64], lengths: Sequence[int], starts: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        if self._padding_idx is None:
            return np.arange(len(ids)) - np.repeat(starts[:-1], lengths)
        # The RoBERTa family counts from padding_idx + 1, and does not count padding tokens, not even within a text.
        real = ids != self._padding_idx
        counts = np.cumsum(real)
        before = np.concatenate(([0], counts))[starts[:-1]]
        positions: NDArray[np.int64] = (counts - np.repeat(before, lengths)) * real + self._padding_idx
        return positions


def to_device(arrays: Sequence[NDArray[np.int64]], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Copy arrays of token ids, positions and lengths to a device at once, as int32 tensors of one dimension."""
    sizes = [array.size for array in arrays]
    # From pinned memory, which PyTorch keeps for reuse, the copy needs no synchronization.
    host = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=device.type == "cuda")
    np.concatenate([array.reshape(-1) for array in arrays], out=host.numpy(), casting="same_kind")
    return torch.split(host.to(device, non_blocking=True), sizes)


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
