"""Rounds the 8-bit matrices of a graph so that the results of their layers change least (GPTQ).

Rounding each value to the nearest integer ignores that the inputs of a layer are correlated. GPTQ rounds one column after
the other, and adds the error of each to the columns that are not yet rounded, as far as these can compensate it. It uses
the inputs that the calibration texts have in the exact graph. Scales, zero points, size and speed remain the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from emb_model_provider.backends.openvino_cpu.runtime import openvino

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from emb_model_provider.backends.openvino_cpu.runtime import Graph

_DAMPING = 0.01
"""Added to the diagonal of a Gram matrix, relative to its mean, so that it can be inverted."""
_SMALLEST = 1e-30
"""Keeps the Gram matrix of a layer whose inputs are all 0 invertible."""
_COLUMNS = 128
"""Columns whose errors are passed on to the others together, because one large product is faster than many small ones."""
_ROWS = 2048
"""Inputs of a layer that are multiplied together, for the same reason."""
_GRAM_BYTES = 256 * 2**20


class Quantized(NamedTuple):
    """An 8-bit matrix as nncf writes it into a graph."""

    constant: Any
    """The node with the integers, of shape (outputs, inputs)."""
    scale: NDArray[np.float64]
    """Of shape (outputs,); likewise the zero point."""
    zero_point: NDArray[np.float64]


def round_matrices(
    graph: Graph, exact: Graph, inputs: Sequence[Mapping[str, NDArray[np.int64]]], *, gram_bytes: int = _GRAM_BYTES
) -> None:
    """Round the 8-bit matrices of a quantized graph again. A matrix that would not improve remains as it is.

    Args:
        graph: The quantized graph, which is changed in place.
        exact: The same graph before it was quantized.
        inputs: Inputs of the exact graph, each a batch without padding.
        gram_bytes: Largest size of the Gram matrices that are in memory at the same time, if they are several. If it does
            not suffice for all, the inputs are computed several times.
    """
    originals = {node.get_friendly_name(): node for node in exact.get_ordered_ops()}
    found: dict[str, tuple[Quantized, NDArray[np.float32]]] = {}
    for node in graph.get_ordered_ops():
        name = node.get_friendly_name()
        if node.get_type_name() != "MatMul" or name not in originals:
            continue
        quantized, weights = _read_quantized(node), _read_floats(originals[name])
        if quantized is not None and weights is not None and weights.shape == quantized.constant.data.shape:
            found[name] = quantized, weights
    for names in _groups({name: weights.shape[1] for name, (_, weights) in found.items()}, gram_bytes):
        for name, gram in _grams(exact, names, inputs).items():
            quantized, weights = found[name]
            if (rounded := round_to_gram(weights, quantized, gram)) is not None:
                _replace(quantized.constant, rounded)


def round_to_gram(
    weights: NDArray[np.float32], quantized: Quantized, gram: NDArray[np.float32]
) -> NDArray[np.float64] | None:
    """Return integers of shape (outputs, inputs) with a smaller error of the results than the present ones; else None.

    Args:
        weights: The exact weights, of shape (outputs, inputs).
        quantized: The present integers, with their scales and zero points.
        gram: The products of all pairs of inputs of the layer, added up over the tokens: shape (inputs, inputs).
    """
    present = quantized.constant.data
    limits = np.iinfo(present.dtype)
    scale, zero_point = quantized.scale, quantized.zero_point
    if not np.isfinite(gram).all():
        return None
    damped = gram.astype(np.float64)
    damped[np.diag_indices_from(damped)] += _DAMPING * np.diag(damped).mean() + _SMALLEST
    # Inputs with the largest values first, while there are most columns left that can compensate their errors.
    order = np.argsort(-np.diag(damped), kind="stable")
    try:
        factor = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    except np.linalg.LinAlgError:
        return None
    remaining = weights[:, order].astype(np.float64)
    rounded = np.empty_like(remaining)
    for start in range(0, remaining.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, remaining.shape[1])
        block = remaining[:, start:stop]
        errors = np.empty_like(block)
        for column in range(stop - start):
            place = start + column
            values = np.clip(np.round(block[:, column] / scale) + zero_point, limits.min, limits.max)
            rounded[:, place] = values
            errors[:, column] = (block[:, column] - (values - zero_point) * scale) / factor[place, place]
            block[:, column:] -= np.outer(errors[:, column], factor[place, place:stop])
        remaining[:, stop:] -= errors @ factor[start:stop, stop:]
    result = np.empty_like(rounded)
    result[:, order] = rounded

    def error(integers: NDArray[Any]) -> float:
        difference = (weights - (integers - zero_point[:, None]) * scale[:, None]).astype(np.float32)
        return float(np.sum((difference @ gram) * difference))

    return result if error(result) < error(present) else None


def _read_quantized(node: Any) -> Quantized | None:
    """Return the second operand of a matrix multiplication if it is an 8-bit matrix with a scale per output."""
    if node.get_attributes()["transpose_b"] is not True:
        return None
    multiply = _skip_conversions(node.input_value(1).get_node())
    if multiply.get_type_name() != "Multiply":
        return None
    values, scale = (_skip_conversions(multiply.input_value(port).get_node()) for port in (0, 1))
    zero_point = None
    if values.get_type_name() == "Subtract":
        values, zero_point = (_skip_conversions(values.input_value(port).get_node()) for port in (0, 1))
    constants = [each for each in (values, scale, zero_point) if each is not None]
    if any(each.get_type_name() != "Constant" for each in constants):
        return None
    if values.get_element_type().get_type_name() not in ("u8", "i8") or len(values.shape) != 2:
        return None
    rows = int(values.shape[0])
    scales = np.array(scale.data, dtype=np.float64).reshape(-1)
    zeros = np.zeros(rows) if zero_point is None else np.array(zero_point.data, dtype=np.float64).reshape(-1)
    if scales.shape != (rows,) or zeros.shape != (rows,) or not (scales > 0).all():
        return None
    return Quantized(values, scales, zeros)


def _read_floats(node: Any) -> NDArray[np.float32] | None:
    constant = _skip_conversions(node.input_value(1).get_node())
    return np.array(constant.data, dtype=np.float32) if constant.get_type_name() == "Constant" else None


def _skip_conversions(node: Any) -> Any:
    while node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    return node


def _groups(widths: Mapping[str, int], gram_bytes: int) -> Iterator[list[str]]:
    """Yield the names of matrices whose Gram matrices fit into the memory together; `widths` has their inputs."""
    names: list[str] = []
    size = 0
    for name, width in widths.items():
        needed = 4 * width**2
        if names and size + needed > gram_bytes:
            yield names
            names, size = [], 0
        names.append(name)
        size += needed
    if names:
        yield names


def _grams(
    exact: Graph, names: Sequence[str], inputs: Sequence[Mapping[str, NDArray[np.int64]]]
) -> dict[str, NDArray[np.float32]]:
    """Return the Gram matrix of the inputs of some layers, by name. Layers with the same input share one."""
    graph = exact.clone()
    nodes = {node.get_friendly_name(): node for node in graph.get_ordered_ops()}
    sources: dict[tuple[str, int], list[str]] = {}
    values = []
    for name in names:
        source = nodes[name].input_value(0)
        key = (source.get_node().get_friendly_name(), source.get_index())
        if key not in sources:
            values.append(source)
        sources.setdefault(key, []).append(name)
    first = len(graph.outputs)
    graph.add_outputs(values)
    request = openvino().Core().compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}).create_infer_request()
    widths = [int(value.get_partial_shape()[-1].get_length()) for value in values]
    grams = [np.zeros((width, width), dtype=np.float32) for width in widths]
    rows: list[list[NDArray[np.float32]]] = [[] for _ in values]
    for number, batch in enumerate(inputs):
        request.infer(batch)
        for place, gram in enumerate(grams):
            output = request.get_output_tensor(first + place).data
            rows[place].append(np.array(output, dtype=np.float32).reshape(-1, gram.shape[0]))
            if sum(map(len, rows[place])) >= _ROWS or number == len(inputs) - 1:
                joined = np.concatenate(rows[place])
                gram += joined.T @ joined
                rows[place].clear()
    return {name: gram for gram, same in zip(grams, sources.values(), strict=True) for name in same}


def _replace(constant: Any, integers: NDArray[np.float64]) -> None:
    rounded = openvino().op.Constant(integers.astype(constant.data.dtype))
    rounded.set_friendly_name(constant.get_friendly_name())
    for target in constant.output(0).get_target_inputs():
        target.replace_source_output(rounded.output(0))
