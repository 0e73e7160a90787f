"""Quantizes the weights of a graph to int8 or int4 with nncf.

int8: every table and matrix in 8 bits, with a scale and a zero point per row. Matrices are rounded by GPTQ over the
calibration texts.
int4: the table of token vectors in 4 bits, with a scale and a zero point per 32 values, everything else in 8 bits. If
that exceeds 21.5 % of the size at fp32, as many matrices as necessary are in 4 bits, too: those that lose least, by
GPTQ over the calibration texts. The matrices in 8 bits are rounded as for int8.

So int4 takes at most 22 % of fp32. The table comes first, because an error in a table affects one token, and an error
in a matrix affects all tokens (see docs/precision.md).
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from emb_model_provider.backends.arrays import pad_inputs
from emb_model_provider.backends.openvino_cpu.runtime import openvino
from emb_model_provider.backends.pairs import PairTokenization
from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.compiler.failures import is_temporary
from emb_model_provider.compiler.rounding import round_matrices
from emb_model_provider.fidelity.texts import calibration_texts
from emb_model_provider.formatting import describe_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import ModelDescription
    from emb_model_provider.backends.openvino_cpu.runtime import Graph

QuantizedWeights = Literal["int8", "int4"]

_GROUP = 32
"""Values that share a scale in 4 bits. If it does not divide a row, the largest smaller power of two that does is used,
down to `_MIN_GROUP`; rows that it does not divide either are quantized to 8 bits."""
_MIN_GROUP = 8
_INT4_SHARE = 0.215
"""Largest size of int4 relative to fp32, slightly below the documented 22 %."""
_BITS_8, _BITS_4 = 8.1, 4 + (16 + 4) / _GROUP
"""Bits of a value on disk, including its part of the scale and of the zero point."""
_MIN_TABLE_ROWS = 16
"""Smaller tables, such as that of token types, are not quantized, because each row is added to many tokens."""
_GPTQ_VALUES = 50_000_000
"""Largest number of values for GPTQ, which takes about 10 minutes for them on two cores in 4 bits, and 2 minutes in 8.
More are rounded to nearest."""
_MAX_CALIBRATION_TOKENS = 256
_CALIBRATION_QUERIES = 8
_QUANTIZABLE = ("MatMul", "Gather", "Convolution", "GroupConvolution", "Broadcast", "Einsum")
"""Operations whose constants nncf may quantize."""


class QuantizeError(Exception):
    """nncf could not quantize a graph; the message contains that of nncf."""


@dataclass(frozen=True, slots=True)
class _Weight:
    """A constant that an operation multiplies by, or looks rows up in."""

    node: str
    is_table: bool
    rows: int
    values: int


def quantize(graph: Graph, weights: QuantizedWeights, description: ModelDescription) -> Graph:
    """Quantize the weights of a graph at fp32, which may be changed in place. Blocks for seconds to minutes.

    Raises:
        QuantizeError: nncf failed.
        ImportError: nncf is not installed.
        OSError: A file cannot be written; likewise any other error for which `is_temporary` is true.
    """
    # First, because it blocks the import of the package with which nncf, too, reports its use.
    openvino()
    import nncf  # type: ignore[import-untyped]  # no py.typed

    logging.getLogger("nncf").setLevel(logging.ERROR)  # nncf.set_log_level changes handlers that are not its own, too
    found = _find_weights(graph)
    small = [weight.node for weight in found if weight.is_table and weight.rows < _MIN_TABLE_ROWS]
    found = [weight for weight in found if weight.node not in small]
    if not found:
        return graph
    exact = graph.clone()
    try:
        if weights == "int4":
            graph = _quantize_to_int4(nncf, graph, found, description)
        graph = nncf.compress_weights(
            graph, mode=nncf.CompressWeightsMode.INT8_ASYM, ignored_scope=_ignore(nncf, small)
        )
        if sum(weight.values for weight in found if not weight.is_table) <= _GPTQ_VALUES:
            round_matrices(graph, exact, calibration_inputs(description))
    except Exception as error:
        if is_temporary(error):
            raise
        raise QuantizeError(f"nncf cannot quantize it to {weights}: {describe_error(error)}") from error
    return graph


def calibration_inputs(description: ModelDescription) -> list[dict[str, NDArray[np.int64]]]:
    """Return the inputs of the graph for each calibration text, with the default prompt: int64 of shape (1, length)."""
    prompt = description.prompts.get(description.default_prompt or "", "")
    limit = min(description.max_length, _MAX_CALIBRATION_TOKENS)
    tokenization, texts = Tokenization(description), calibration_texts()
    if description.kind == "reranker":
        # Short ones, because a long query would leave no room for a document.
        queries = itertools.cycle(sorted(texts, key=len)[:_CALIBRATION_QUERIES])
        pairs = list(zip(queries, texts, strict=False))
        tokens = (
            PairTokenization(tokenization, description).encode(pairs, long_documents="cut", max_tokens=limit).inputs
        )
    else:
        tokens = tokenization.encode(texts, prompt=prompt, max_tokens=limit)
    batch = tokens.batch()
    return [pad_inputs(batch, [row], len(ids), description) for row, ids in enumerate(batch.ids)]


def _quantize_to_int4(nncf: Any, graph: Graph, weights: Sequence[_Weight], description: ModelDescription) -> Graph:
    """Quantize the largest table to 4 bits and, if that is not enough, a part of the matrices."""
    table = max((weight for weight in weights if weight.is_table), key=lambda weight: weight.values, default=None)
    options: dict[str, Any] = {
        "mode": nncf.CompressWeightsMode.INT4_ASYM,
        "group_size": _GROUP,
        # Otherwise nncf keeps tables and the last layer at 8 bits.
        "all_layers": True,
        "advanced_parameters": nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST, min_adjusted_group_size=_MIN_GROUP
        ),
    }
    share = _matrix_share(graph, weights, table)
    others = [node.get_friendly_name() for node in graph.get_ordered_ops() if node.get_type_name() in _QUANTIZABLE]
    matrix_nodes = {weight.node for weight in weights if not weight.is_table}
    tables = [name for name in others if name not in matrix_nodes]
    if table is not None:
        others.remove(table.node)
        graph = nncf.compress_weights(graph, ignored_scope=_ignore(nncf, others), **options)
    if share <= 0:
        return graph
    matrices = sum(weight.values for weight in weights if not weight.is_table)
    return nncf.compress_weights(
        graph,
        ratio=share,
        dataset=nncf.Dataset(calibration_inputs(description)),
        subset_size=len(calibration_texts()),
        gptq=matrices * share <= _GPTQ_VALUES,
        ignored_scope=_ignore(nncf, tables),
        **options,
    )


def _matrix_share(graph: Graph, weights: Sequence[_Weight], table: _Weight | None) -> float:
    """Return the share of matrix values, 0 to 1, that must be in 4 bits for the graph to be small enough."""
    values = sum(
        int(np.prod(node.shape))
        for node in graph.get_ordered_ops()
        if node.get_type_name() == "Constant" and node.get_element_type().is_real()
    )
    matrices = sum(weight.values for weight in weights if not weight.is_table)
    in_table = table.values if table is not None else 0
    in_8_bits = sum(weight.values for weight in weights) - in_table
    unquantized = values - in_8_bits - in_table
    bits = 32 * unquantized + _BITS_8 * in_8_bits + _BITS_4 * in_table
    excess = bits - _INT4_SHARE * 32 * values
    return float(np.clip(excess / max((_BITS_8 - _BITS_4) * matrices, 1), 0, 1))


def _find_weights(graph: Graph) -> list[_Weight]:
    weights = []
    for node in graph.get_ordered_ops():
        kind = node.get_type_name()
        if kind not in ("MatMul", "Gather"):
            continue
        for port in (0,) if kind == "Gather" else (0, 1):
            source = node.input_value(port).get_node()
            while source.get_type_name() == "Convert":
                source = source.input_value(0).get_node()
            if source.get_type_name() == "Constant" and len(source.shape) > 1 and source.get_element_type().is_real():
                size = int(np.prod(source.shape))
                weights.append(_Weight(node.get_friendly_name(), kind == "Gather", int(source.shape[0]), size))
    return weights


def _ignore(nncf: Any, names: Sequence[str]) -> Any:
    return nncf.IgnoredScope(names=list(names), validate=False)
