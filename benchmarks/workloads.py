"""The requests that every contender gets, and their bodies."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.texts import count_texts
from emb_model_provider.model_spec import BUNDLED_MODEL

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.texts import Corpus, Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests of one kind over several connections, each of which sends its next request after a response."""

    name: str
    kind: Kind
    texts: int
    """Texts in a request."""
    connections: int
    max_rate: int
    """Requests per second that no server is expected to reach. It determines how many bodies are prepared."""

    @property
    def title(self) -> str:
        plural = "s" if self.connections > 1 else ""
        return f"{count_texts(self.kind, self.texts)}, {self.connections} connection{plural}"


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload(name="short-1", kind="short", texts=1, connections=1, max_rate=2000),
        Workload(name="short-16", kind="short", texts=1, connections=16, max_rate=5000),
        Workload(name="short-64", kind="short", texts=1, connections=64, max_rate=5000),
        Workload(name="doc-16", kind="doc", texts=1, connections=16, max_rate=700),
        Workload(name="doc-64", kind="doc", texts=1, connections=64, max_rate=700),
        Workload(name="short32-4", kind="short", texts=32, connections=4, max_rate=200),
        Workload(name="doc32-4", kind="doc", texts=32, connections=4, max_rate=30),
    )
}

OPEN_LOOPS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload(name="open-short", kind="short", texts=1, connections=16, max_rate=3500),
        Workload(name="open-doc", kind="doc", texts=1, connections=16, max_rate=500),
    )
}
"""Poisson arrivals of single texts, at a share of the rate that the closed loops of the same kind reached.

The number of connections is that of the warm-up.
"""


@dataclass(frozen=True, slots=True)
class Bodies:
    """Request bodies in files, one per line. The two files have no text in common."""

    measured: Path
    warm_up: Path


def request_body(texts: Sequence[str], encoding: str) -> str:
    """Return the JSON of a request in one line, as the OpenAI SDK writes it."""
    return json.dumps(
        {"input": texts[0] if len(texts) == 1 else list(texts), "model": BUNDLED_MODEL, "encoding_format": encoding}
    )


def write_bodies(path: Path, corpus: Corpus, kind: Kind, texts: int, requests: int, encoding: str) -> Path:
    """Write the bodies of `requests` requests with `texts` new texts each, and return the path."""
    drawn = corpus.texts(kind, texts * requests)
    lines = [request_body(drawn[start : start + texts], encoding) for start in range(0, len(drawn), texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def write_rerank_bodies(path: Path, corpus: Corpus, kind: Kind, documents: int, requests: int) -> Path:
    """Write the bodies of requests to rerank new documents for a new short query, and return the path."""
    lines = [
        json.dumps(
            {"query": corpus.texts("short", 1)[0], "documents": corpus.texts(kind, documents), "raw_scores": True}
        )
        for _ in range(requests)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read_inputs(path: Path) -> list[list[str]]:
    """Return the texts of every body in a file."""
    inputs = [json.loads(line)["input"] for line in path.read_text(encoding="utf-8").splitlines()]
    return [[texts] if isinstance(texts, str) else texts for texts in inputs]


def read_pairs(path: Path) -> list[list[tuple[str, str]]]:
    """Return the pairs of a query and a document of every body in a file."""
    bodies = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [[(body["query"], document) for document in body["documents"]] for body in bodies]
