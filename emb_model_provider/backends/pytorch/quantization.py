"""int8 and int4 weights in the torch backend: torchao's int8, bitsandbytes' nf4, and an int8 table of words.

The packages are the extra `quantization`, imported only for a model that asks for them.

Measured with all-MiniLM-L6-v2 on two cores of an AMD Zen 4 (AVX512-BF16, no AMX): cosine to fp32 over 107 texts in
many languages, resident size of all weights, and throughput against fp32 (32 texts of 14 to 26 tokens, one thread,
runs of all variants by turns).

| | activations | min cosine | mean | MB | speed |
|---|---|---|---|---|---|
| fp32 | fp32 | 1.0000 | 1.0000 | 90.9 | 1.0 |
| bf16 | bf16 | 0.9999 | 0.9999 | 45.4 | 1.8 |
| **int8**: torchao, groups of 32, int8 words | bf16 | 0.9992 | 0.9997 | 24.7 | 1.6 |
| the same | fp32 | 0.9993 | 0.9998 | 25.2 | 0.95 |
| **int4**: nf4 feed-forward, the rest as int8 | bf16 | 0.935 | 0.979 | 20.5 | 1.4 |
| the same | fp32 | 0.935 | 0.979 | 20.9 | 1.1 |

And what was not taken, over the same texts: int8 with one scale an output 0.9961 / 0.9992; int8 weights and
activations 0.978 / 0.995, with asymmetric activations 0.992 / 0.998, no faster; nf4 in every layer 0.899 / 0.958
(blocks of 64) and 0.917 / 0.963 (blocks of 32), at 18.8 MB. Scales of nf4 in 8 bits (double quantization) change
nothing that can be seen. On CUDA nothing was measured yet.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from emb_model_provider.backends.pytorch.import_guards import quiet_imports
from emb_model_provider.errors import UnsupportedModelError, UnsupportedPrecisionError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

    from emb_model_provider.backends.base import ComputePrecision

PACKAGES: dict[ComputePrecision, tuple[str, ...]] = {
    "int8": ("torchao",),
    "int4": ("torchao", "bitsandbytes"),
}
"""What a precision needs beside PyTorch; none for those that are not here."""

_GROUP = 32
"""Weights of one output that share a scale."""
_CPU_ROWS = 32
"""bitsandbytes' fast CPU layout takes outputs in groups of this size."""
_ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)
_TABLE_ROWS_AT_A_TIME = 8192


def require_packages(precision: ComputePrecision) -> None:
    """Import what `precision` needs; nothing for fp32, bf16 and fp16.

    Raises: UnsupportedPrecisionError, which names the extra, where it is not installed or cannot be imported.
    """
    for name in PACKAGES.get(precision, ()):
        _imported(name, precision)


@torch.no_grad()
def quantize_pipeline(
    pipeline: SentenceTransformer, *, precision: ComputePrecision, device: str
) -> tuple[str, ...]:
    """Put int8 or int4 weights in the place of a pipeline's linear layers and word table, and move it to `device`.

    The pipeline comes in the dtype that it is to compute in. A layer is moved and quantized before the next one,
    so that a GPU never holds the model at full size. Classes derived from Linear are left alone: they may read
    their weight in a way of their own.

    int4 is for the feed-forward layers, two thirds of a transformer's weights. Attention, Dense modules and the word
    table are more sensitive, or gain nothing, and become int8.

    Returns what an operator should know of it.

    Raises: UnsupportedPrecisionError where the extra is missing, UnsupportedModelError where the model has no
    linear layer to quantize.
    """
    packages = {name: _imported(name, precision) for name in PACKAGES[precision]}
    linears = [
        (parent, name, child, f"{path}.{name}")
        for path, parent in pipeline.named_modules()
        for name, child in parent.named_children()
        if type(child) is torch.nn.Linear
    ]
    if not linears:
        raise UnsupportedModelError(
            f"Precision {precision}: the model has no linear layers to quantize. Use fp32, fp16, bf16 or auto."
        )
    transformer = {id(module) for module in pipeline[0].modules()}
    for parent, name, linear, path in linears:
        if precision == "int4" and id(linear) in transformer and not _ATTENTION.search(path):
            setattr(parent, name, _to_nf4(linear, packages["bitsandbytes"], device))
        else:
            _to_int8(linear.to(device), packages["torchao"])
    _quantize_words(pipeline, device)
    pipeline.to(device)
    if precision == "int4":
        return ("int4 is for the feed-forward layers; attention and the word table are int8",)
    return ()


class Int8Embedding(torch.nn.Module):
    """A word table in int8, one scale a row.

    torchao's own int8 embedding makes the whole table floating point again at every lookup; this one gathers rows
    first.
    """

    weight: torch.Tensor
    """int8 of shape (rows, width)."""
    scale: torch.Tensor
    """float32 of shape (rows, 1)."""

    @torch.no_grad()
    def __init__(self, source: torch.nn.Embedding) -> None:
        """Take over `source`'s rows as its `forward` gives them: some models scale what they look up."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = source.num_embeddings, source.embedding_dim
        self.padding_idx = source.padding_idx
        self.dtype = source.weight.dtype
        weight = torch.empty(source.weight.shape, dtype=torch.int8, device=source.weight.device)
        scale = torch.empty((self.num_embeddings, 1), dtype=torch.float32, device=source.weight.device)
        for start in range(0, self.num_embeddings, _TABLE_ROWS_AT_A_TIME):
            rows = slice(start, min(start + _TABLE_ROWS_AT_A_TIME, self.num_embeddings))
            values = source(torch.arange(rows.start, rows.stop, device=weight.device)).float()
            # A row of zeros (padding) has no scale of its own.
            scale[rows] = (
                values.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
            )
            weight[rows] = (values / scale[rows]).round().to(torch.int8)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return vectors of shape (*ids.shape, width) in the dtype that the table had."""
        return (self.weight[ids] * self.scale[ids]).to(self.dtype)


def _quantize_words(pipeline: SentenceTransformer, device: str) -> None:
    model: Any = pipeline.transformers_model
    if model is None:
        return
    try:
        table = model.get_input_embeddings()
    except NotImplementedError:  # transformers' answer for a model that reads no words, such as one of images
        return
    if not isinstance(table, torch.nn.Embedding) or table.max_norm is not None:
        return
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is table:
                setattr(parent, name, Int8Embedding(table.to(device)))


def _to_int8(linear: torch.nn.Linear, torchao: Any) -> None:
    whole_groups = linear.in_features % _GROUP == 0
    granularity = torchao.quantization.PerGroup(_GROUP) if whole_groups else torchao.quantization.PerRow()
    # The inductor settings that it would change are the whole process's, and nothing is compiled here.
    config = torchao.quantization.Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)
    torchao.quantization.quantize_(linear, config)


def _to_nf4(linear: torch.nn.Linear, bitsandbytes: Any, device: str) -> torch.nn.Module:
    # Made without memory: its weight and bias are put in below.
    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=linear.weight.dtype,
        device="meta",
    )
    layer.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type="nf4", blocksize=_GROUP, module=layer
    )
    layer.bias = linear.bias
    if linear.out_features % _CPU_ROWS or linear.in_features % _GROUP:
        # The fast CPU layout holds whole blocks only; without it the layer is computed all the same.
        layer.support_avx512bf16_for_cpu = False
    quantized: torch.nn.Module = layer.eval().to(device)
    return quantized


def _imported(name: str, precision: ComputePrecision) -> Any:
    try:
        with quiet_imports():
            return import_module(name)
    except Exception as error:
        # Not only ImportError: a package built for another PyTorch fails in ways of its own.
        reason = (
            "which is not installed" if isinstance(error, ModuleNotFoundError) else f"which failed: {error}"
        )
        raise UnsupportedPrecisionError(
            f"Precision {precision} in the torch backend needs {name}, {reason}. Install the extra: "
            'uv sync --extra quantization (from a checkout), or pip install "emb-model-provider[quantization]". On a '
            "CPU the compiled engine needs no extra: EMB_PROVIDER_BACKEND=auto."
        ) from error
