"""Quantizes the weights of the torch backend to int8 (torchao) and int4 (bitsandbytes' nf4), and the word table to int8.

These methods keep more of the accuracy than the alternatives at the same size (see docs/precision.md). The packages
are in the extra `quantization`, and are imported only for a model that uses them.
"""

from __future__ import annotations

import re
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from emb_model_provider.backends.pytorch import quiet_imports
from emb_model_provider.backends.pytorch.pipeline import word_table
from emb_model_provider.errors import UnsupportedModelError, UnsupportedPrecisionError
from emb_model_provider.formatting import describe_error

if TYPE_CHECKING:
    from sentence_transformers.base.model import BaseModel

    from emb_model_provider.backends.base import ComputePrecision

PACKAGES: dict[ComputePrecision, tuple[str, ...]] = {"int8": ("torchao",), "int4": ("torchao", "bitsandbytes")}
"""Packages that a precision requires besides PyTorch; precisions that are not listed require none."""

_GROUP = 32
"""Number of weights of one output that share a scale."""
_CPU_ROWS = 32
"""The fast CPU layout of bitsandbytes requires a multiple of this number of outputs."""
_ATTENTION = re.compile(r"att(entio)?n", re.IGNORECASE)
_TABLE_ROWS_PER_STEP = 8192


def import_packages(precision: ComputePrecision) -> dict[str, Any]:
    """Import the packages that a precision requires; UnsupportedPrecisionError, which names the extra, if one is missing."""
    packages = {}
    for name in PACKAGES.get(precision, ()):
        try:
            with quiet_imports():
                packages[name] = import_module(name)
        except Exception as error:
            # Not only ImportError, because a package built for another version of PyTorch can raise other errors.
            is_missing = isinstance(error, ModuleNotFoundError)
            reason = "which is not installed" if is_missing else f"whose import failed: {describe_error(error)}"
            raise UnsupportedPrecisionError(
                f"Precision {precision} in the torch backend needs {name}, {reason}. Install the extra: "
                'uv sync --extra quantization (from a checkout), or pip install "emb-model-provider[quantization]". On '
                "a CPU, OpenVINO needs no extra: `--backend auto`, or EMB_PROVIDER_BACKEND=auto."
            ) from error
    return packages


@torch.no_grad()
def quantize_pipeline(pipeline: BaseModel, *, precision: ComputePrecision, device: str) -> tuple[str, ...]:
    """Quantize the linear layers and the word table of a pipeline in place, and move it to a device.

    Layers are moved and quantized one by one, so that a GPU never holds the model at full size. Subclasses of Linear
    are not quantized, because they may use their weight differently.

    With int4, only the feed-forward layers are nf4, which are two thirds of the weights of a transformer. Attention,
    Dense modules and the word table are more sensitive, or gain nothing, and become int8.

    Args:
        pipeline: A pipeline on the CPU, in the dtype that it computes in.
        precision: int8 or int4.
        device: The device to move it to.

    Returns:
        Notes for the operator.
    """
    packages = import_packages(precision)
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
    _quantize_word_table(pipeline, device)
    pipeline.to(device)
    if precision == "int4":
        return ("int4 applies to the feed-forward layers; attention and the word table are int8",)
    return ()


class Int8Embedding(torch.nn.Module):
    """A word table in int8, with one scale per row.

    Unlike the int8 embedding of torchao, which dequantizes the whole table at every lookup, it gathers rows first.
    """

    weight: torch.Tensor
    """int8 of shape (rows, width)."""
    scale: torch.Tensor
    """float32 of shape (rows, 1)."""

    @torch.no_grad()
    def __init__(self, source: torch.nn.Embedding) -> None:
        """Quantize the rows that the `forward` of a table returns, because some models scale them there."""
        super().__init__()
        self.num_embeddings, self.embedding_dim = source.num_embeddings, source.embedding_dim
        self.padding_idx = source.padding_idx
        self.dtype = source.weight.dtype
        weight = torch.empty(source.weight.shape, dtype=torch.int8, device=source.weight.device)
        scale = torch.empty((self.num_embeddings, 1), dtype=torch.float32, device=source.weight.device)
        for start in range(0, self.num_embeddings, _TABLE_ROWS_PER_STEP):
            rows = slice(start, min(start + _TABLE_ROWS_PER_STEP, self.num_embeddings))
            values = source(torch.arange(rows.start, rows.stop, device=weight.device)).float()
            # The minimum is for rows of zeros (padding), which have no scale.
            scale[rows] = values.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
            weight[rows] = (values / scale[rows]).round().to(torch.int8)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return vectors of shape (*ids.shape, width) in the dtype of the original table."""
        return (self.weight[ids] * self.scale[ids]).to(self.dtype)


def _quantize_word_table(pipeline: BaseModel, device: str) -> None:
    model: Any = pipeline.transformers_model
    table = word_table(pipeline)
    if not isinstance(table, torch.nn.Embedding) or table.max_norm is not None:
        return
    for parent in model.modules():
        for name, child in parent.named_children():
            if child is table:
                setattr(parent, name, Int8Embedding(table.to(device)))


def _to_int8(linear: torch.nn.Linear, torchao: Any) -> None:
    whole_groups = linear.in_features % _GROUP == 0
    granularity = torchao.quantization.PerGroup(_GROUP) if whole_groups else torchao.quantization.PerRow()
    # set_inductor_config would change settings of the whole process, and nothing is compiled here.
    config = torchao.quantization.Int8WeightOnlyConfig(granularity=granularity, set_inductor_config=False)
    torchao.quantization.quantize_(linear, config)


def _to_nf4(linear: torch.nn.Linear, bitsandbytes: Any, device: str) -> torch.nn.Module:
    # Created without memory, because weight and bias are assigned below.
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
        # The fast CPU layout supports whole blocks only; the layer also works without it, but slower.
        layer.support_avx512bf16_for_cpu = False
    quantized: torch.nn.Module = layer.eval().to(device)
    return quantized
