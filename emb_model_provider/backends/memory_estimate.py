"""Estimates how much memory a model takes in its process or on its device, from the size of its weights.

It is not measured, because the growth of the process includes that of other models. The estimate excludes the runtimes,
and is within about a quarter of the measured growth, except for OpenVINO models with a large token table, whose rows
are read only when they are used (see docs/performance.md).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emb_model_provider.backends.base import BackendKind, ComputePrecision, ModelDescription
    from emb_model_provider.backends.repository import Repository
    from emb_model_provider.model_spec import Precision

_MIB = 2**20
_OPENVINO_WORKING_BYTES, _TORCH_WORKING_BYTES = 96 * _MIB, 22 * _MIB
"""Activations and kernels. They hardly depend on the model or on the number of streams, because the tokens of a batch
are bounded."""
_TORCH_RUNTIME_BYTES = 700 * _MIB
"""Memory of a process that has imported torch and sentence-transformers."""
_USUAL_WIDTH = 1024
_VECTORS_OF_A_TOKEN, _INNER_VECTORS_OF_A_TOKEN = 8, 3
_SHARE_FOR_BATCHES = 0.7
"""Of the free memory of a GPU. The rest is for its library, for fragments, and for a model that is loaded later."""
_SMALLEST_DEVICE_BATCH = 512
_FP32_COPIES, _OTHER_COPIES = 3, 2
"""Copies of the matrices that OpenVINO holds besides the mapped file, because kernels for short and for long batches
need them in different layouts."""
_SHORT_BYTES = 10 * _MIB
"""Memory of a graph that is compiled for one shape, except its matrices."""
_USUAL_GROWTH = 3
"""Typical memory of a compiled model, relative to its size on disk."""
_ITEM_BYTES: Mapping[ComputePrecision, int] = {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "int4": 1}
_UNIGRAM_ENTRY_BYTES, _ENTRY_BYTES = 900, 130
"""Memory of a tokenizer per entry of its vocabulary."""
_MINIMUM_SHARES: Mapping[Precision, float] = {"fp32": 1.0, "int8": 0.25, "int4": 0.125}
"""Memory that torch needs at least, relative to the model's files, which may be at fp32."""

_LAYER_BYTES = 20_000
"""Memory of the Python objects of a layer; 58 KB were measured for BERT."""
_WIDTHS = ("hidden_size", "d_model", "dim", "n_embd")
_LAYERS = ("num_hidden_groups", "num_hidden_layers", "num_layers", "n_layers", "n_layer")
"""Names of `config.json`, those that count less first: the layers of a group share their weights."""
_INNER_WIDTHS = ("intermediate_size", "d_ff", "hidden_dim", "n_inner", "ffn_dim")
_TABLE_WIDTHS = ("embedding_size", "embedding_dim")
_MOST_POSITIONS = 2**20
"""Up to this number, the positions of a model can be computed instead of stored."""


def openvino_bytes(
    stored: int,
    matrix_items: int,
    dequantized_bytes: int,
    compute: ComputePrecision,
    description: ModelDescription,
    *,
    short_lengths: int = 0,
) -> int:
    """Estimate the memory of a compiled graph in bytes, whose weights file has `stored` bytes.

    Args:
        stored: See above.
        matrix_items: Number of values in its matrices.
        dequantized_bytes: Bytes of the matrices that were stored as integers and dequantized when the graph was compiled.
        compute: The precision that it computes at.
        description: Description of the model.
        short_lengths: Number of lengths of short inputs for which it is compiled again.
    """
    copy = matrix_bytes(matrix_items, compute)
    kernels = (_FP32_COPIES if compute == "fp32" else _OTHER_COPIES) * copy + short_lengths * (copy + _SHORT_BYTES)
    return stored + dequantized_bytes + kernels + _OPENVINO_WORKING_BYTES + _tokenizer_bytes(description)


def matrix_bytes(matrix_items: int, compute: ComputePrecision) -> int:
    """Return the bytes of a copy of the matrices of a model with `matrix_items` values."""
    return matrix_items * _ITEM_BYTES[compute]


def torch_bytes(held: int, description: ModelDescription, working_bytes: int | None = None) -> int:
    """Estimate the memory of a torch pipeline in bytes.

    Args:
        held: Bytes of its parameters and buffers.
        description: Its description.
        working_bytes: Memory of its batches on a GPU, where the tokenizers are not. None: it runs on a CPU.
    """
    if working_bytes is not None:
        return held + working_bytes
    # sentence-transformers has a second tokenizer.
    return held + _TORCH_WORKING_BYTES + 2 * _tokenizer_bytes(description)


def activation_bytes(repository: Repository, item_bytes: int) -> int:
    """Estimate the memory on a GPU that a batch needs at most for each of its tokens, in bytes.

    Args:
        repository: The files of the model. Its configuration declares the widths.
        item_bytes: Bytes of an activation.
    """
    config = repository.config
    width = _size(config, _WIDTHS) or _USUAL_WIDTH
    inner = _size(config, _INNER_WIDTHS) or 4 * width
    # The residual, the input of the layer, queries, keys, values, two rotated ones and the result; the inner vectors before
    # and after the activation, and a gate. And the vectors of the tokens at fp32 at the end.
    return item_bytes * (_VECTORS_OF_A_TOKEN * width + _INNER_VECTORS_OF_A_TOKEN * inner) + 4 * width


def device_batch_tokens(free: int, token_bytes: int, streams: int) -> int:
    """Return the largest batch in tokens for which memory is free on a GPU.

    Args:
        free: Free memory in bytes.
        token_bytes: Memory that a batch needs for each token.
        streams: Number of batches at a time.
    """
    return max(_SMALLEST_DEVICE_BATCH, int(free * _SHARE_FOR_BATCHES) // (token_bytes * streams))


def static_bytes(table: int, description: ModelDescription) -> int:
    """Estimate the memory of static embeddings in bytes, whose table has `table` bytes."""
    return table + _tokenizer_bytes(description)


def minimum_bytes(backend: BackendKind, size: int, precision: Precision) -> int:
    """Return a lower bound of the memory of a model before it is loaded, from the size of its files in bytes."""
    return size if backend != "torch" else int(size * _MINIMUM_SHARES.get(precision, 0.5))


def expected_bytes(backend: BackendKind, size: int, precision: Precision) -> int:
    """Estimate the memory of a model before it is loaded, from the size of its files in bytes."""
    if backend == "openvino":
        return _USUAL_GROWTH * size + _OPENVINO_WORKING_BYTES
    return minimum_bytes(backend, size, precision) + _TORCH_WORKING_BYTES


def interim_bytes(size: int) -> int:
    """Estimate the memory of a process that runs a model with torch, from the size of its files in bytes."""
    return _TORCH_RUNTIME_BYTES + 2 * size


def declared_bytes(repository: Repository, item_bytes: float) -> float:
    """Return a lower bound of the memory of the weights that the configuration files of a model declare.

    The libraries allocate what these files declare, whatever the size of the files with the weights.

    Args:
        repository: The files of the model.
        item_bytes: Bytes of each weight.
    """
    config = repository.config
    parts = [config, *(part for name, part in config.items() if name.endswith("_config") and isinstance(part, dict))]
    modules = [repository.read(f"{module['path']}/config.json") for module in repository.nested_modules[1:]]
    dense = sum(_size(module, ("in_features",)) * _size(module, ("out_features",)) for module in modules)
    weights = max(map(_declared_weights, parts)) + dense
    return weights * item_bytes + max(_size(part, _LAYERS) for part in parts) * _LAYER_BYTES


def _declared_weights(config: Mapping[str, Any]) -> int:
    width = _size(config, _WIDTHS)
    layer = 2 * width * (width + _size(config, _INNER_WIDTHS))  # two of four matrices of an attention, two of a MLP
    rows = _size(config, ("vocab_size",)) + _size(config, ("type_vocab_size",))
    positions = _size(config, ("max_position_embeddings", "n_positions"))
    if positions > _MOST_POSITIONS and not any("rope" in name or "rotary" in name for name in config):
        rows += positions
    return _size(config, _LAYERS) * layer + rows * (_size(config, _TABLE_WIDTHS) or width)


def _size(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    """Return the first of these sizes that a configuration declares, or 0."""
    return next((value for name in names if isinstance(value := config.get(name), int) and value > 0), 0)


def _tokenizer_bytes(description: ModelDescription) -> int:
    unigram = re.search(r'"type"\s*:\s*"Unigram"', description.tokenizer_json) is not None
    return description.vocab_size * (_UNIGRAM_ENTRY_BYTES if unigram else _ENTRY_BYTES)
