"""What is asked of every contender, and the request bodies for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emb_model_provider.model_spec import BUNDLED_MODEL

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.texts import Corpus, Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests of one kind, over a number of connections that each send as soon as they are answered."""

    name: str
    kind: Kind
    texts: int
    """Texts in a request."""
    connections: int
    ceiling: int
    """Requests a second that nobody is expected to reach; so many bodies are prepared."""

    @property
    def title(self) -> str:
        what = "short text" if self.kind == "short" else "document"
        many = f"{self.texts} {what}s" if self.texts > 1 else f"1 {what}"
        return f"{many}, {self.connections} connection{'s' if self.connections > 1 else ''}"


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload(name="short-1", kind="short", texts=1, connections=1, ceiling=2000),
        Workload(name="short-16", kind="short", texts=1, connections=16, ceiling=5000),
        Workload(name="short-64", kind="short", texts=1, connections=64, ceiling=5000),
        Workload(name="doc-16", kind="doc", texts=1, connections=16, ceiling=700),
        Workload(name="doc-64", kind="doc", texts=1, connections=64, ceiling=700),
        Workload(name="short32-4", kind="short", texts=32, connections=4, ceiling=200),
        Workload(name="doc32-4", kind="doc", texts=32, connections=4, ceiling=30),
    )
}

OPEN_LOOPS: dict[str, Kind] = {"open-short": "short", "open-doc": "doc"}
"""Poisson arrivals of single texts, at a share of the rate that the closed loops of the same kind reached."""
OPEN_CEILING = {"short": 3500, "doc": 500}


@dataclass(frozen=True, slots=True)
class Bodies:
    """Request bodies in a file, one a line. The warm-up's texts are in none of the others."""

    measured: Path
    warm_up: Path


def body(texts: Sequence[str], encoding: str) -> str:
    """Return the JSON of a request in one line, as the OpenAI SDK writes it."""
    return json.dumps(
        {
            "input": texts[0] if len(texts) == 1 else list(texts),
            "model": BUNDLED_MODEL,
            "encoding_format": encoding,
        }
    )


def write_bodies(path: Path, corpus: Corpus, kind: Kind, texts: int, requests: int, encoding: str) -> Path:
    """Write bodies of new texts, and return the path."""
    drawn = corpus.texts(kind, texts * requests)
    lines = [body(drawn[start : start + texts], encoding) for start in range(0, len(drawn), texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_inputs(path: Path) -> list[list[str]]:
    """Return the texts of every body in a file."""
    inputs = [json.loads(line)["input"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [[given] if isinstance(given, str) else given for given in inputs]
