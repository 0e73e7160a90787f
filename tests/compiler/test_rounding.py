"""Rounding of 8-bit matrices by GPTQ."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import openvino
import pytest

from emb_model_provider.compiler.rounding import Quantized, round_matrices, round_to_gram

if TYPE_CHECKING:
    from numpy.typing import NDArray

ops = openvino.opset13

WIDTH, OUTPUTS, TOKENS = 160, 24, 64
"""More inputs than the rounding handles at a time."""
FLOATS = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}


def correlated(seed: int = 0) -> NDArray[np.float32]:
    """Return a table of vectors whose values are mostly determined by a few numbers, as in a model."""
    random = np.random.default_rng(seed)
    few = random.normal(size=(TOKENS, 12)) @ random.normal(size=(12, WIDTH))
    return (few + 0.1 * random.normal(size=(TOKENS, WIDTH))).astype(np.float32)


def quantize_rows(weights: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """Return the nearest integers, and the scale and zero point of each row."""
    low, high = weights.min(axis=1, keepdims=True), weights.max(axis=1, keepdims=True)
    scale = (high - low) / 255
    zero_point = np.round(-low / scale)
    integers = np.clip(np.round(weights / scale) + zero_point, 0, 255)
    return integers.astype(np.uint8), scale.astype(np.float32), zero_point.astype(np.uint8)


def result_error(weights: NDArray[np.float32], integers: NDArray[Any], inputs: NDArray[np.float32]) -> float:
    """Return the norm of the error of the results of a layer."""
    _, scale, zero_point = quantize_rows(weights)
    return float(np.linalg.norm(inputs @ (weights - (integers - zero_point.astype(np.float64)) * scale).T))


def layer(seed: int = 1) -> tuple[NDArray[np.float32], Quantized]:
    weights = np.random.default_rng(seed).normal(size=(OUTPUTS, WIDTH)).astype(np.float32)
    integers, scale, zero_point = quantize_rows(weights)
    return weights, Quantized(ops.constant(integers), scale[:, 0].astype(float), zero_point[:, 0].astype(float))


def test_the_results_of_a_layer_change_less_than_with_the_nearest_integers() -> None:
    """The integers are valid, most of them differ, and none by much."""
    weights, quantized = layer()
    inputs = correlated()
    rounded = round_to_gram(weights, quantized, inputs.T @ inputs)
    assert rounded is not None
    nearest = quantized.constant.data
    assert result_error(weights, rounded, inputs) < 0.5 * result_error(weights, nearest, inputs)
    assert (rounded == rounded.astype(np.uint8)).all()
    assert 0 < np.abs(rounded - nearest).mean() < 3


def test_other_texts_gain_as_well() -> None:
    """The rounding is not only right for the inputs that it was made with."""
    weights, quantized = layer()
    every = correlated()
    seen, other = every[::2], every[1::2]
    rounded = round_to_gram(weights, quantized, seen.T @ seen)
    assert rounded is not None
    assert result_error(weights, rounded, other) < 0.7 * result_error(weights, quantized.constant.data, other)


@pytest.mark.parametrize("value", [0.0, 1.0, np.nan, np.inf])
def test_the_nearest_integers_remain_if_nothing_is_better(value: float) -> None:
    """Inputs without correlation, a layer that is never reached, and results that are not finite."""
    weights, quantized = layer()
    assert round_to_gram(weights, quantized, np.diag(np.full(WIDTH, value, dtype=np.float32))) is None


def graphs(*, transpose: bool = True) -> tuple[Any, Any, list[NDArray[np.float32]]]:
    """Return a quantized graph with two layers that read the same table, the exact graph, and their weights."""
    matrices = [layer(seed)[0] for seed in (1, 2)]

    def build(operand: Any) -> Any:
        ids = ops.parameter([-1, -1], dtype=np.int64, name="input_ids")
        vectors = ops.gather(ops.constant(correlated()), ids, ops.constant(0))
        found = []
        for number, matrix in enumerate(matrices):
            node = ops.matmul(
                vectors, operand(matrix if transpose else np.ascontiguousarray(matrix.T)), False, transpose
            )
            node.set_friendly_name(f"layer {number}")
            found.append(node)
        return openvino.Model(found, [ids], "two layers")

    def compressed(matrix: NDArray[np.float32]) -> Any:
        integers, scale, zero_point = quantize_rows(matrix)
        shifted = ops.subtract(ops.convert(ops.constant(integers), "f32"), ops.convert(ops.constant(zero_point), "f32"))
        return ops.multiply(shifted, ops.constant(scale))

    return build(compressed), build(ops.constant), matrices


def integers_of(graph: Any) -> list[NDArray[np.uint8]]:
    """Return the 8-bit matrices of a graph, in the order of its layers."""
    layers = sorted(
        (node for node in graph.get_ops() if node.get_type_name() == "MatMul"), key=lambda n: n.friendly_name
    )
    found = []
    for node in layers:
        while node.get_type_name() != "Constant":
            node = node.input_value(1 if node.get_type_name() == "MatMul" else 0).get_node()
        found.append(np.array(node.data))
    return found


@pytest.mark.parametrize("gram_bytes", [1, 2**30])
def test_all_matrices_of_a_graph_are_rounded(gram_bytes: int) -> None:
    """Over all calibration texts, at once or one after the other if the memory does not suffice."""
    graph, exact, matrices = graphs()
    before = integers_of(graph)
    inputs = [{"input_ids": np.arange(start, start + 8)[None]} for start in range(0, TOKENS, 8)]
    round_matrices(graph, exact, inputs, gram_bytes=gram_bytes)
    table = correlated()
    for matrix, old, new in zip(matrices, before, integers_of(graph), strict=True):
        assert result_error(matrix, new, table) < 0.5 * result_error(matrix, old, table)
    compiled = openvino.Core().compile_model(graph, "CPU", FLOATS)
    results = list(compiled({"input_ids": np.arange(TOKENS)[None]}).values())
    for number, matrix in enumerate(matrices):
        _, scale, zero_point = quantize_rows(matrix)
        weights = (integers_of(graph)[number] - zero_point.astype(np.float32)) * scale
        np.testing.assert_allclose(results[number][0], table @ weights.T, rtol=1e-3, atol=1e-2)


def test_a_matrix_that_is_stored_otherwise_remains_as_it_is() -> None:
    """Its scales do not belong to its outputs."""
    graph, exact, _ = graphs(transpose=False)
    before = integers_of(graph)
    round_matrices(graph, exact, [{"input_ids": np.arange(TOKENS)[None]}])
    for old, new in zip(before, integers_of(graph), strict=True):
        np.testing.assert_array_equal(old, new)
