"""Types of the values of vectors in responses: floats, 8-bit integers, and sign bits.

Integers have one range for all values of a vector, so that the cosine of two int8 vectors is almost that of the floats. A
range for each value would be narrower, but would change the angles (see docs/precision.md). The range belongs to the model
and not to a request, so that the bytes of a text do not depend on the other texts of its request.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from emb_model_provider.backends.base import Calibration

OutputType = Literal["float", "float16", "int8", "uint8", "binary", "ubinary"]
"""Type of the values of a vector. `binary` and `ubinary` have one bit for each value, and eight of them in each byte."""

OUTPUT_TYPES: tuple[OutputType, ...] = get_args(OutputType)

_QUANTILE = 0.9999
"""Share of the values within the range of integers. The few larger ones are clipped, which costs fewer neighbors than a
wider range."""
_LARGEST = 127
_LARGEST_FLOAT16 = 65504.0
_SMALLEST = 1e-30
"""Keeps divisions by the norm of a zero vector finite."""
_DIGITS = 4
"""Significant digits of ranges, so that the tiny differences between two measurements do not change a vector."""


def measure_ranges(vectors: NDArray[np.float32]) -> tuple[float, float]:
    """Return `spread` and `unscaled_range` of a `Calibration`, for vectors of shape (texts, dimension).

    The vectors must be those of the model before any normalization.
    """
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.maximum(norms, _SMALLEST)
    spread = float(np.quantile(np.abs(unit), _QUANTILE)) * math.sqrt(vectors.shape[1])
    return _round_up(spread), _round_up(float(np.quantile(np.abs(vectors), _QUANTILE)))


def range_of(calibration: Calibration, dimensions: int, *, normalized: bool) -> float:
    """Return the largest absolute value that integers represent, for vectors of a size."""
    return calibration.spread / math.sqrt(dimensions) if normalized else calibration.unscaled_range


def convert(vectors: NDArray[np.float32], kind: OutputType, value_range: float) -> NDArray[Any]:
    """Return vectors with values of another type.

    Args:
        vectors: float32 of shape (inputs, dimensions).
        kind: The type of the result. Bits are 1 for positive values, and the first is the most significant bit of its
            byte; missing bits of the last byte are 0. `binary` has these bytes minus 128, as int8.
        value_range: The absolute value that becomes 127 of int8 and 255 of uint8. Larger ones are clipped. 0 becomes 0 of
            int8 and 128 of uint8.

    Returns:
        An array of shape (inputs, dimensions), or (inputs, dimensions / 8) for `binary` and `ubinary`, rounded up.
    """
    match kind:
        case "float":
            return vectors
        case "float16":
            return np.clip(vectors, -_LARGEST_FLOAT16, _LARGEST_FLOAT16).astype("<f2")
        case "int8" | "uint8":
            scaled = np.rint(vectors * np.float32(_LARGEST / max(value_range, _SMALLEST)))
            integers = np.clip(scaled, -_LARGEST, _LARGEST).astype(np.int8)
            return integers if kind == "int8" else _offset(integers.view(np.uint8))
        case "ubinary" | "binary":
            packed = np.packbits(vectors > 0, axis=1)
            return packed if kind == "ubinary" else _offset(packed).view(np.int8)


def _offset(values: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Add 128 to bytes, modulo 256."""
    return values ^ np.uint8(128)


def _round_up(value: float) -> float:
    if value <= 0:
        return _SMALLEST
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - _DIGITS)
    return float(f"{math.ceil(value / unit) * unit:.{_DIGITS}g}")
