"""What the vectors should be, and how near a contender comes to it.

Run as a program it writes sentence-transformers' vectors at fp32, so that torch stays out of the measuring process:
`python -m benchmarks.reference TEXTS.json VECTORS.npy`.
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

from benchmarks.cache import ROOT
from benchmarks.workloads import body
from emb_model_provider.hubs.local import find_bundled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from benchmarks.contenders import Server


@dataclass(frozen=True, slots=True)
class Agreement:
    """How near vectors come to the reference."""

    texts: int
    dimension: int
    min_cosine: float
    mean_cosine: float


@dataclass(frozen=True, slots=True)
class Reference:
    """Sample texts and their vectors."""

    texts: list[str]
    vectors: NDArray[np.float32]

    def check(self, server: Server, encoding: str) -> Agreement:
        """Ask for the sample, each text alone and all in one request, and compare.

        Raises: RuntimeError where an answer has not the right number or size of vectors.
        """
        alone = [vector for text in self.texts for vector in _ask(server, [text], encoding)]
        together = _ask(server, self.texts, encoding)
        return self.compare([alone, together], server.contender.name)

    def compare(self, answers: Sequence[Sequence[NDArray[np.float32]]], name: str) -> Agreement:
        cosines = []
        for vectors in answers:
            shape = (len(vectors), *{len(vector) for vector in vectors})
            if shape != self.vectors.shape:
                raise RuntimeError(f"{name} gave vectors of shape {shape}, not {self.vectors.shape}")
            found = np.array(vectors, dtype=np.float64)
            cosines.append(
                (found * self.vectors).sum(axis=1)
                / np.linalg.norm(found, axis=1)
                / np.linalg.norm(self.vectors, axis=1)
            )
        every = np.concatenate(cosines)
        return Agreement(len(self.texts), self.vectors.shape[1], float(every.min()), float(every.mean()))


def reference(texts: list[str], directory: Path) -> Reference:
    """Compute the vectors of texts in a process of its own."""
    given, written = directory / "sample.json", directory / "sample.npy"
    given.write_text(json.dumps(texts), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.reference", str(given), str(written)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode != 0:
        raise RuntimeError(f"the reference could not be computed:\n{done.stderr[-2000:]}")
    return Reference(texts, np.load(written))


def _ask(server: Server, texts: Sequence[str], encoding: str) -> list[NDArray[np.float32]]:
    status, answer = server.post(body(texts, encoding))
    if status != 200:
        raise RuntimeError(f"{server.contender.name} answered {status}: {answer[:500]!r}")
    data = json.loads(answer)["data"]
    if [item["index"] for item in data] != list(range(len(texts))):
        raise RuntimeError(f"{server.contender.name} gave {len(data)} vectors for {len(texts)} texts")
    return [_vector(item["embedding"]) for item in data]


def _vector(value: str | list[float]) -> NDArray[np.float32]:
    if isinstance(value, str):
        return np.frombuffer(base64.b64decode(value), dtype="<f4")
    return np.array(value, dtype=np.float32)


def _main(given: Path, written: Path) -> None:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(find_bundled()), device="cpu", local_files_only=True)
    # One at a time: no padding, so nothing of one text can touch another.
    np.save(written, model.encode(json.loads(given.read_text(encoding="utf-8")), batch_size=1))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]))
