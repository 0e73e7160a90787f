"""Types of the values of vectors."""

from __future__ import annotations

import numpy as np
import pytest

from emb_model_provider.backends.base import Calibration
from emb_model_provider.backends.output_types import convert, measure_ranges, range_of


def vectors(*rows: list[float]) -> np.ndarray:
    return np.array(rows, dtype=np.float32)


def test_integers_have_one_range_for_all_values() -> None:
    """The range becomes 127, 0 becomes 0 of int8 and 128 of uint8, and larger values are clipped."""
    values = vectors([0.0, 0.5, -0.5, 0.25, 9.0, -9.0])
    assert convert(values, "int8", 0.5).tolist() == [[0, 127, -127, 64, 127, -127]]
    assert convert(values, "uint8", 0.5).tolist() == [[128, 255, 1, 192, 255, 1]]
    assert convert(values, "int8", 0.5).dtype == np.int8
    assert convert(values, "uint8", 0.5).dtype == np.uint8


def test_bits_begin_with_the_most_significant_one() -> None:
    """Positive values are 1. `binary` has the bytes minus 128, like Cohere and sentence-transformers."""
    values = vectors([0.1, -1, 0, 2, -3, -4, -5, 6], [1] * 8, [-1] * 8)
    assert convert(values, "ubinary", 1.0).tolist() == [[0b10010001], [255], [0]]
    assert convert(values, "binary", 1.0).tolist() == [[0b10010001 - 128], [127], [-128]]
    assert convert(values, "binary", 1.0).dtype == np.int8


def test_missing_bits_of_the_last_byte_are_zero() -> None:
    assert convert(vectors([1] * 9, [-1] * 8 + [1]), "ubinary", 1.0).tolist() == [[255, 128], [0, 128]]


def test_floats() -> None:
    """float16 is finite even for values that it cannot represent."""
    values = vectors([0.1, 1e6, -1e6])
    assert convert(values, "float", 1.0) is values
    half = convert(values, "float16", 1.0)
    assert half.dtype == np.float16
    assert half.tolist() == [[pytest.approx(0.1, rel=1e-3), 65504.0, -65504.0]]


def test_quantized_types_equal_those_of_sentence_transformers() -> None:
    """Its bits are the same; its integers have a range for each value, which is not comparable."""
    from sentence_transformers.util import quantize_embeddings

    values = np.random.default_rng(0).standard_normal((20, 64)).astype(np.float32)
    for kind in ("binary", "ubinary"):
        assert convert(values, kind, 1.0).tolist() == quantize_embeddings(values, kind).tolist()  # type: ignore[arg-type]


def test_ranges_are_measured_for_both_lengths() -> None:
    """The range of vectors of length 1 depends on their size, because more values are smaller."""
    values = 10 * np.random.default_rng(0).standard_normal((500, 100)).astype(np.float32)
    spread, unscaled = measure_ranges(values)
    assert 3.5 < spread < 4.5
    assert 35 < unscaled < 45
    calibration = Calibration(spread, unscaled, {})
    assert range_of(calibration, 100, normalized=True) == pytest.approx(spread / 10)
    assert range_of(calibration, 25, normalized=True) == pytest.approx(spread / 5)
    assert range_of(calibration, 100, normalized=False) == unscaled


def test_ranges_do_not_depend_on_tiny_differences() -> None:
    """They are rounded up, so that two measurements of the same model give the same integers."""
    values = np.random.default_rng(1).standard_normal((100, 32)).astype(np.float32)
    assert measure_ranges(values) == measure_ranges(values * np.float32(1 + 1e-7))
    assert measure_ranges(values)[0] == float(f"{measure_ranges(values)[0]:.4g}")


def test_vectors_of_zeros() -> None:
    """They stay zeros, also in a model that has no other vectors."""
    zeros = np.zeros((3, 8), dtype=np.float32)
    spread, unscaled = measure_ranges(zeros)
    assert spread > 0
    assert unscaled > 0
    assert not convert(zeros, "int8", unscaled).any()
