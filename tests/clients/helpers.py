"""Texts, keys and comparisons for the tests of SDKs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

IGNORE_WARNINGS = pytest.mark.filterwarnings("ignore")
"""The SDKs use deprecated functions of other packages, and leave connections open."""
KEY = "sk-clients-0123456789"
QUERY, DOCUMENT = "query: ", "passage: "
"""Prompts of the model."""
TEXTS = ["a cat sits on the mat", "向量数据库", "Ein Hund läuft.", "x " * 400]


DIFY = "dify_plugin==0.7.4"
"""The latest version for Python 3.11."""


class Reference(Protocol):
    """Embeds texts with sentence-transformers."""

    def __call__(self, *texts: str, prompt: str = "") -> NDArray[np.float32]:
        """Return float32 vectors of shape (texts, 384)."""
        ...


def run_with_dify(script: str, **arguments: Any) -> Any:
    """Run a script of this directory with Dify's plugin SDK, and return the JSON that it prints."""
    uv = os.environ.get("UV") or shutil.which("uv")
    if uv is None:
        pytest.skip("uv not found: it installs the SDK of Dify into an environment of its own")
    path = Path(__file__).with_name(f"{script}.py")
    command = [uv, "run", "--isolated", "--no-project", "--with", DIFY, "python", path, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_vectors(actual: Any, expected: NDArray[np.float32]) -> None:
    """Check vectors by value. Both sides compute in fp32, with different kernels."""
    np.testing.assert_allclose(np.array(actual, dtype=np.float32), expected, atol=1e-5)


def shortened(vectors: NDArray[np.float32], dimensions: int | None) -> NDArray[np.float32]:
    """Return the first dimensions of vectors, normalized; None: all."""
    short = vectors[:, :dimensions]
    return short / np.linalg.norm(short, axis=1, keepdims=True)


def assert_types(actual: Mapping[str, Any], expected: NDArray[np.float32], model: Mapping[str, Any]) -> None:
    """Check vectors of each type by value: integers by the range of the model, bits by the sign of the reference.

    Args:
        actual: Type to vectors.
        expected: The vectors of the reference, normalized.
        model: The model, as `GET /v1/models` describes it.
    """
    value_range = model["output_types"]["int8_range"] * np.sqrt(model["dimensions"] / expected.shape[1])
    integers = np.clip(np.rint(expected * 127 / value_range), -127, 127)
    bits = np.packbits(expected > 0, axis=1).astype(int)
    values = {"int8": integers, "uint8": integers + 128, "ubinary": bits, "binary": bits - 128}
    for kind, vectors in actual.items():
        if kind == "float":
            assert_vectors(vectors, expected)
        elif kind in ("int8", "uint8"):
            # A value between two integers can be rounded to either, because the last bits of the floats differ.
            assert np.abs(np.array(vectors) - values[kind]).max() <= 1
            assert (np.array(vectors) == values[kind]).mean() > 0.99
        else:
            assert np.array(vectors).shape == values[kind].shape
            assert (np.array(vectors) == values[kind]).mean() > 0.98
