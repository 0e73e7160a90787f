"""Batches without padding: all inputs end to end in one row, each attending to itself alone.

PyTorch's fastest attention kernels take no padding mask. Packed, every token that is computed is one that was
asked for, and the kernel is told where each input starts. sentence-transformers' Pooling reads such rows already.

Only families that are known to work are packed, and only where packed and padded vectors agree on this model and
this device: everything else is padded. A packed batch holds no more tokens than the padded one that the batcher
reckoned with, and attention's memory grows with their number, not with its square.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from sentence_transformers.base.modules import Dense, Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers import AttentionInterface

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer

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
"""`model_type` of the families whose forward takes position ids and hands its keyword arguments to attention. Not
here, and padded: those with a bias by relative position (MPNet, DeBERTa, T5), which the kernels do not take."""

PROBES = (
    "a",
    "How do I reset my password?",
    "今天天气很好，我们去公园散步。",
    "Как восстановить пароль?",
    "The quick brown fox jumps over the lazy dog. " * 6,
    "Embedding models turn text into vectors that can be compared. " * 40,
)
"""Texts of one to several hundred tokens that a model is tried on."""

_ATTENTION = "emb_model_provider_varlen"
_NAMES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_TOLERANCE = 1e-4
_NOISE_FACTOR = 3.0
_MOST = 0.01
_LARGEST_HEAD = 256


class Kernel(Protocol):
    """Attention of inputs that stand end to end."""

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        starts: torch.Tensor,
        longest: int,
        *,
        scale: float,
        window: tuple[int, int],
    ) -> torch.Tensor:
        """Return shape (tokens, heads, width of a head).

        `query` has that shape too; `key` and `value` may have fewer heads, each shared by a group of the query's.
        `starts` is int32 of shape (inputs + 1): where each input starts, and where the last one ends. `window` is
        how many tokens to the left and right a token sees, -1 for all.
        """
        ...


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
    """PyTorch's variable-length attention (cuDNN or flash, whichever it prefers on this device); see `Kernel`."""
    from torch.nn.attention.varlen import varlen_attn

    width = query.shape[-1]
    # The kernels take heads in steps of 8. Zeros change no product, and what they add to the result is cut off.
    if missing := -width % 8:
        query, key, value = (torch.nn.functional.pad(x, (0, missing)) for x in (query, key, value))
    out: Any = varlen_attn(
        query.contiguous(), key.contiguous(), value.contiguous(), starts, starts, longest, longest,
        scale=scale, window_size=window, enable_gqa=key.shape[1] != query.shape[1],
    )  # fmt: skip
    attended: torch.Tensor = out
    return attended[..., :width]


def varlen_available(device: torch.device) -> bool:
    """Whether this PyTorch and this device have the kernels that `varlen_kernel` calls."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 8:
        return False
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    # Before these came, causal masks were asked for in another way.
    return {"scale", "window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters)


def packable(pipeline: SentenceTransformer) -> bool:
    """Whether every module of a pipeline can take packed rows: a known family, one Pooling, then whole vectors."""
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
        # Repositories may bring a class of their own under a family's name.
        and type(model).__module__.startswith("transformers.models.")
        and width <= _LARGEST_HEAD
        and not getattr(config, "is_decoder", False)
    )


class Packing:
    """Makes packed rows for one pipeline, whose attention it replaces."""

    def __init__(self, pipeline: SentenceTransformer, *, kernel: Kernel = varlen_kernel) -> None:
        """Take over the attention of a `packable` pipeline: from now on it reads packed rows only."""
        first: Any = pipeline[0]
        self._padding_idx = _padding_idx(first.model)
        self._before = str(first.model.config._attn_implementation)
        name = _ATTENTION if kernel is varlen_kernel else f"{_ATTENTION}_{id(kernel)}"
        AttentionInterface.register(name, _interface(kernel))
        # transformers makes no masks for a name that it has no mask function for: exactly what is wanted.
        first.model.set_attn_implementation(name)

    def undo(self, pipeline: SentenceTransformer) -> None:
        """Give the pipeline, or a copy of it, its own attention back, for padded rows."""
        first: Any = pipeline[0]
        first.model.set_attn_implementation(self._before)

    def features(self, ids: Sequence[Sequence[int]], tokens: torch.Tensor) -> dict[str, Any]:
        """Return what the pipeline reads for inputs `ids`, of which `tokens` is the concatenation on the device.

        `input_ids` and `position_ids` are int64 of shape (1, tokens); `seq_idx` says for each token whose it is.
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
        # The RoBERTa family counts from padding_idx + 1, and does not count a padding token even within a text.
        rows = [np.asarray(row) != self._padding_idx for row in ids]
        counted = [np.cumsum(real) * real + self._padding_idx for real in rows]
        return np.concatenate(counted).astype(np.int64)


def disagreement(
    packed: NDArray[np.float32], padded: NDArray[np.float32], alone: NDArray[np.float32]
) -> str | None:
    """Return why packed vectors are not to be used, or None where they are as good as padded ones.

    Each of shape (inputs, dimension): packed together, padded together, and one by one without padding. Half
    precision gives slightly different vectors for every shape of batch, so what padding itself changes is the
    measure of what packing may.
    """
    noise = 1 - _lowest_cosine(padded, alone)
    allowed = min(max(_TOLERANCE, _NOISE_FACTOR * noise), _MOST)
    # Packed must be near both: near one alone could be luck.
    found = 1 - min(_lowest_cosine(packed, padded), _lowest_cosine(packed, alone))
    if found <= allowed:
        return None
    return f"cosine {1 - found:.6f} where {1 - allowed:.6f} is needed"


def _lowest_cosine(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    a, b = left.astype(np.float64), right.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosines = (a * b).sum(axis=1) / np.maximum(lengths, 1e-30)
    # A vector that is not finite agrees with none.
    return float(np.nan_to_num(cosines, nan=-1.0).min())


def _padding_idx(model: torch.nn.Module) -> int | None:
    """Return the padding id from which a model of the RoBERTa family counts positions; None for all others."""
    for module in model.modules():
        found = getattr(module, "padding_idx", None)
        if isinstance(found, int) and isinstance(
            getattr(module, "position_embeddings", None), torch.nn.Embedding
        ):
            return found
    return None


def _interface(kernel: Kernel) -> Callable[..., tuple[torch.Tensor, None]]:
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
        """Transformers' attention function: (1, heads, tokens, width) in, (1, tokens, heads, width) out."""
        if cu_seq_lens_q is None or max_length_q is None or attention_mask is not None or softcap is not None:
            raise ValueError("packed attention needs packed rows, and takes neither a mask nor a soft cap")
        causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", False))
        # transformers counts the token itself as part of its window.
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
