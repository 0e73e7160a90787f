"""Reference vectors, and the cosine of the vectors of a server to them.

As a program (`python -m benchmarks.reference TEXTS.json VECTORS.npy`) it computes the vectors with sentence-transformers
at fp32, so that the process that measures does not import torch.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import ROOT
from benchmarks.workloads import request_body
from emb_model_provider.hubs.local import find_bundled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from benchmarks.contenders import Server


@dataclass(frozen=True, slots=True)
class Agreement:
    """Cosines of vectors to the reference."""

    texts: int
    dimension: int
    min_cosine: float
    mean_cosine: float


@dataclass(frozen=True, slots=True)
class Reference:
    """Sample texts and their vectors."""

    texts: list[str]
    vectors: NDArray[np.float32]
    """float32 of shape (texts, dimension)."""

    def check(self, server: Server, encoding: str) -> Agreement:
        """Request the vectors of the sample, each text alone and all in one request, and compare them.

        Raises:
            RuntimeError: A response has another status than 200, or the wrong number or size of vectors.
        """
        alone = [vector for text in self.texts for vector in _embed(server, [text], encoding)]
        together = _embed(server, self.texts, encoding)
        return self.compare([alone, together], server.contender.name)

    def compare(self, responses: Sequence[Sequence[NDArray[np.float32]]], name: str) -> Agreement:
        """Return the agreement of the vectors of several responses, each of which covers the whole sample.

        Raises:
            RuntimeError: The number or size of the vectors is wrong. `name` is named in the message.
        """
        expected, cosines = self.vectors, []
        for vectors in responses:
            shape = (len(vectors), *{len(vector) for vector in vectors})
            if shape != expected.shape:
                raise RuntimeError(f"{name} returned vectors of shape {shape} instead of {expected.shape}.")
            actual = np.array(vectors, dtype=np.float64)
            norms = np.linalg.norm(actual, axis=1) * np.linalg.norm(expected, axis=1)
            cosines.append((actual * expected).sum(axis=1) / norms)
        lowest, mean = float(np.min(cosines)), float(np.mean(cosines))
        return Agreement(len(self.texts), expected.shape[1], lowest, mean)


def compute_reference(texts: list[str], directory: Path) -> Reference:
    """Compute the vectors of texts in a child process, which exchanges files in `directory`."""
    texts_file, vectors_file = directory / "sample.json", directory / "sample.npy"
    texts_file.write_text(json.dumps(texts), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.reference", str(texts_file), str(vectors_file)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    if process.returncode != 0:
        raise RuntimeError(f"The reference could not be computed:\n{process.stderr[-2000:]}")
    return Reference(texts, np.load(vectors_file))


def decode_vector(value: str | list[float]) -> NDArray[np.float32]:
    """Return the vector of an `embedding` field in either encoding, float32 of shape (dimension,)."""
    if isinstance(value, str):
        return np.frombuffer(base64.b64decode(value, validate=True), dtype="<f4")
    return np.array(value, dtype=np.float32)


def _embed(server: Server, texts: Sequence[str], encoding: str) -> list[NDArray[np.float32]]:
    status, response = server.post(request_body(texts, encoding))
    if status != 200:
        raise RuntimeError(f"{server.contender.name} responded with {status}: {response[:500]!r}")
    data = json.loads(response)["data"]
    if [item["index"] for item in data] != list(range(len(texts))):
        raise RuntimeError(f"{server.contender.name} returned {len(data)} vectors for {len(texts)} texts.")
    return [decode_vector(item["embedding"]) for item in data]


def _main(texts_file: Path, vectors_file: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(find_bundled()), device="cpu", local_files_only=True)
    texts = json.loads(texts_file.read_text(encoding="utf-8"))
    # One text at a time, because padding makes small differences.
    np.save(vectors_file, model.encode(texts, batch_size=1))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
