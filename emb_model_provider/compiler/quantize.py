"""What int8 and int4 mean: a graph's weights as small integers, by nncf. Runs in the compile process only.

int8: every table and matrix in 8 bits, with a scale and a zero point a row.
int4: the table of token vectors in 4 bits, with a scale and a zero point for every 32 values, all else in 8 bits;
where that is more than 21.5 % of fp32, as many matrices as bring it there are in 4 bits, too, those that bear it
best, by GPTQ over the calibration texts. So int4 is at most 22 % of fp32, and 4 bits are spent where they cost least.

Why so: measured with all-MiniLM-L6-v2 (half of whose weights are the table) over texts that neither probes nor
calibration hold: 485 of up to 400 characters, for the rows marked * all 970, longer ones. Cosine to fp32, ten
nearest neighbours kept, and weights on disk as a share of fp32. Two cores of a Zen 4 (AVX512-BF16, AVX512-VNNI).

                                                     min      mean   top-10    disk
    bf16, nothing quantized *                      0.99995  0.99999   0.995   1.000
    int8 *                                         0.99712  0.99953   0.982   0.253
    int8, activations 8 bits as they come (a) *    0.99642  0.99934   0.976   0.253
    int8 without zero points *                     0.99339  0.99926   0.972   0.252
    int8, a scale for every 128 values (b)         0.99938  0.99978   0.987   0.258
    int4: table 4 bits, matrices 8                 0.99481  0.99844   0.960   0.197
      the same, token types (2 rows) in 4 bits     0.98127  0.99669   0.952   0.197
      the same, scales by least squares (b)        0.99123  0.99825   0.958   0.197
      and 1/4 of the matrices in 4 bits, GPTQ (c)  0.97497  0.99306   0.932   0.186
      and 1/2 of the matrices in 4 bits, GPTQ (c)  0.97078  0.99169   0.920   0.172
      and all matrices in 4 bits, GPTQ (c)         0.94683  0.98243   0.889   0.146
      and all, scale estimation (c)                0.91226  0.97092   0.870   0.146
    table 8 bits, matrices 4, data-free (b)        0.91975  0.97009   0.873   0.203
      the same, a scale for every 16 (b)           0.94106  0.97977   0.895   0.212
    table 5 bits, matrices 8 (b)                   0.99657  0.99919   0.975   0.208

Over the texts of `corpus`, which are shorter and more alike, so that neighbours change sooner:

    bf16, nothing quantized                        0.99995  0.99998   0.993   1.000
    int8, computed in bf16                         0.99820  0.99947   0.976   0.253
    int8, activations 8 bits (a)                   0.99746  0.99919   0.970   0.253
    int4, computed in bf16                         0.99397  0.99792   0.947   0.197
    int4, activations 8 bits (a)                   0.99473  0.99765   0.947   0.197

With activations in 8 bits, keeping the table of positions or the attention of any one of the six layers at fp32
leaves int8 at 0.968 to 0.972 of neighbours and the same cosines: no layer is the one that costs.
(a) what a processor with VNNI and without AMX computes, see `openvino_runtime`; (b) simulated in numpy: nncf or
OpenVINO do not offer it; (c) with token types in 4 bits, which was found to cost that much only later: they are
added to every token, so their error does not average out, and they hold next to nothing. The usual way round,
matrices in 4 bits and tables in 8, is the worst there is here: a table's error is one token's, a matrix's is all's.
Earlier, on another machine: weights and activations in 8 bits by calibration (PTQ with SmoothQuant): 0.66 at least.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from emb_model_provider.backends.openvino_cpu.runtime import (
    ATTENTION_MASK,
    INPUT_IDS,
    POOLING_MASK,
    openvino,
)
from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.fidelity.texts import CALIBRATION

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import ModelDescription
    from emb_model_provider.backends.openvino_cpu.runtime import Graph

QuantizedWeights = Literal["int8", "int4"]

_GROUP = 32
"""Values that share a scale in 4 bits. Rows that it does not divide get a smaller power of two, down to the next;
those that even that does not divide stay at 8 bits."""
_LEAST_GROUP = 8
_INT4_SHARE = 0.215
"""Of fp32's bytes: what int4 takes at most, a little below what is promised, 22 %."""
_BITS_8, _BITS_4 = 8.1, 4 + (16 + 4) / _GROUP
"""A value's share of disk: its own bits, and its part of the scale and the zero point."""
_FEW_ROWS = 16
"""Tables of fewer rows (token types) stay as they are."""
_GPTQ_VALUES = 50_000_000
"""More than these are rounded to the nearest instead: GPTQ takes about 10 minutes for them on two cores."""
_LONGEST = 256
"""Tokens of a calibration text."""


class QuantizeError(Exception):
    """nncf could not quantize a graph; the message is its own."""


@dataclass(frozen=True, slots=True)
class _Weight:
    """Values that a node multiplies with, or looks up."""

    node: str
    is_table: bool
    rows: int
    values: int


def quantize(graph: Graph, to: QuantizedWeights, description: ModelDescription) -> Graph:
    """Return a graph (fp32) with its weights as integers; the one given may be changed. Blocks for seconds to minutes.

    A graph that has no weights to quantize is returned as it is.

    Raises: QuantizeError; ImportError where nncf is not installed.
    """
    # First, since it keeps the package from being imported by which nncf, too, reports its use.
    openvino()
    import nncf  # type: ignore[import-untyped]  # no py.typed

    nncf.set_log_level(logging.ERROR)
    weights = _weights(graph)
    few = [weight.node for weight in weights if weight.is_table and weight.rows < _FEW_ROWS]
    weights = [weight for weight in weights if weight.node not in few]
    if not weights:
        return graph
    try:
        if to == "int4":
            graph = _in_4_bits(nncf, graph, weights, description)
        return nncf.compress_weights(
            graph, mode=nncf.CompressWeightsMode.INT8_ASYM, ignored_scope=_leaving(nncf, few)
        )
    except Exception as error:
        text = " ".join(str(error).split())
        raise QuantizeError(
            f"nncf cannot quantize it to {to}: {type(error).__name__}: {text[:300]}"
        ) from error


def _in_4_bits(nncf: Any, graph: Graph, weights: Sequence[_Weight], description: ModelDescription) -> Graph:
    """Quantize the largest table to 4 bits, and the matrices, to 4 or 8 bits, if that alone leaves too much."""
    table = max(
        (weight for weight in weights if weight.is_table), key=lambda weight: weight.values, default=None
    )
    shared: dict[str, Any] = {
        "mode": nncf.CompressWeightsMode.INT4_ASYM,
        "group_size": _GROUP,
        # Else nncf keeps tables, and whatever comes last, at 8 bits.
        "all_layers": True,
        "advanced_parameters": nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST, min_adjusted_group_size=_LEAST_GROUP
        ),
    }  # fmt: skip
    share = _share_of_matrices(graph, weights, table)
    others = [
        node.get_friendly_name() for node in graph.get_ordered_ops() if node.get_type_name() in _READERS
    ]
    tables = [
        name for name in others if name not in {weight.node for weight in weights if not weight.is_table}
    ]
    if table is not None:
        others.remove(table.node)
        graph = nncf.compress_weights(graph, ignored_scope=_leaving(nncf, others), **shared)
    if share <= 0:
        return graph
    matrices = sum(weight.values for weight in weights if not weight.is_table)
    return nncf.compress_weights(
        graph,
        ratio=share,
        dataset=nncf.Dataset(calibration_inputs(description)),
        subset_size=len(CALIBRATION),
        gptq=matrices * share <= _GPTQ_VALUES,
        ignored_scope=_leaving(nncf, tables),
        **shared,
    )


def _share_of_matrices(graph: Graph, weights: Sequence[_Weight], table: _Weight | None) -> float:
    """Return which share of the matrices' values has to be in 4 bits for all to be small enough, 0 to 1."""
    values = sum(
        int(np.prod(node.shape))
        for node in graph.get_ordered_ops()
        if node.get_type_name() == "Constant" and node.get_element_type().is_real()
    )
    matrices = sum(weight.values for weight in weights if not weight.is_table)
    in_table = table.values if table is not None else 0
    in_8_bits = sum(weight.values for weight in weights) - in_table
    as_they_are = values - in_8_bits - in_table
    bits = 32 * as_they_are + _BITS_8 * in_8_bits + _BITS_4 * in_table
    too_many = bits - _INT4_SHARE * 32 * values
    return float(np.clip(too_many / max((_BITS_8 - _BITS_4) * matrices, 1), 0, 1))


_READERS = ("MatMul", "Gather", "Convolution", "GroupConvolution", "Broadcast", "Einsum")
"""Operations whose constants nncf may quantize."""


def _weights(graph: Graph) -> list[_Weight]:
    """Return a graph's tables and matrices."""
    found = []
    for node in graph.get_ordered_ops():
        kind = node.get_type_name()
        if kind not in ("MatMul", "Gather"):
            continue
        for port in (0,) if kind == "Gather" else (0, 1):
            source = node.input_value(port).get_node()
            while source.get_type_name() == "Convert":
                source = source.input_value(0).get_node()
            if (
                source.get_type_name() == "Constant"
                and len(source.shape) > 1
                and source.get_element_type().is_real()
            ):
                size = int(np.prod(source.shape))
                found.append(_Weight(node.get_friendly_name(), kind == "Gather", int(source.shape[0]), size))
    return found


def _leaving(nncf: Any, names: Sequence[str]) -> Any:
    return nncf.IgnoredScope(names=list(names), validate=False)


def calibration_inputs(description: ModelDescription) -> list[dict[str, NDArray[np.int64]]]:
    """Return the graph's inputs for each calibration text, one text a batch, under the model's default prompt."""
    prompt = description.prompts.get(description.default_prompt or "", "")
    limit = min(description.max_length, _LONGEST)
    encoded = Tokenization(description).encode(
        list(CALIBRATION), prompt=prompt, truncate="END", max_tokens=limit
    )
    batches = []
    for ids, prompt_length in zip(encoded.ids, encoded.prompt_lengths, strict=True):
        mask = np.ones((1, len(ids)), dtype=np.int64)
        batch = {INPUT_IDS: np.asarray([ids], dtype=np.int64), ATTENTION_MASK: mask}
        if description.excludes_prompt:
            batch[POOLING_MASK] = mask.copy()
            batch[POOLING_MASK][0, :prompt_length] = 0
        batches.append(batch)
    return batches
