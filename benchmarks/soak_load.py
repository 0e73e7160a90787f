"""The questions of a soak: what is asked, what the answer must be, and when another one is excused."""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.texts import Corpus
from tests.faults.planted import WORDS

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from benchmarks.soak_client import Reply
    from tests.faults.planted import Fault

EMBEDDINGS = "/v1/embeddings"
TRUE = 0.999
"""Cosine to its reference from which a vector is that of its text."""
APART = 0.98
"""Texts of the pool are less alike than this, so that none can pass for another."""
MAX_REQUEST_TOKENS = 20_000
PASSING: tuple[Fault, ...] = ("nan", "slow")
FAILING: tuple[Fault, ...] = ("raise", "memory-one", "nan-always", "exit")
"""Faults that a text asks for by itself: those after which the answer is right, and those of which it is 500."""

ORDINARY = {
    "short": 36.0, "doc": 10.0, "32 short": 8.0, "200 short": 1.5, "32 docs": 2.0, "no model named": 4.0,
}  # fmt: skip
REFUSED = {
    "unknown model": 3.0, "bad JSON": 3.0, "no inputs": 2.0, "null input": 1.0, "too many tokens": 0.7,
    "too long": 1.5, "dimensions": 1.0, "unknown route": 1.0,
}  # fmt: skip
LOOKING = {"/health": 2.0, "/metrics": 0.5, "/v1/models": 1.0}
MISBEHAVING = {"slow writer": 2.0, "gone while it waits": 4.0, "gone while it writes": 2.0}
FAULTY = {"one bad input": 4.0, "a bad input that passes": 2.5}


@dataclass(frozen=True, slots=True)
class ManifestKey:
    """A request, and the answer it must have in the end."""

    kind: str
    body: bytes = b""
    status: int = 200
    code: str | None = None
    """Of the error that is due."""
    model: str = ""
    """Alias that answers; empty where none is asked."""
    rows: tuple[int, ...] = ()
    """Of the pool: which texts the vectors are of."""
    method: str = "POST"
    path: str = EMBEDDINGS
    takes_s: float = 0.0
    hangs_up_after_s: float | None = None
    """The client does not wait for an answer."""
    sent: float = 1.0
    """Share of the body that is sent before it hangs up."""


@dataclass(slots=True)
class Pool:
    """Texts, and their vectors by model. The texts with faults come last."""

    texts: list[str]
    short: list[int]
    docs: list[int]
    faulty: dict[Fault, list[int]]
    vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """float32 of shape (texts, dimension), rows of length 1."""

    def keep_apart(self, vectors: NDArray[np.float32]) -> int:
        """Take out of use what is too much like another text; return how many are left."""
        alike = np.triu(vectors @ vectors.T, 1) > APART
        bad = set(np.flatnonzero(alike.any(axis=0)).tolist())
        self.short = [row for row in self.short if row not in bad]
        self.docs = [row for row in self.docs if row not in bad]
        self.faulty = {fault: [row for row in rows if row not in bad] for fault, rows in self.faulty.items()}
        return len(self.texts) - len(bad)


def make_pool(count: int, seed: int) -> Pool:
    corpus, words = Corpus(seed), set(WORDS.values())

    def plain(kind: Any, number: int) -> list[str]:
        found: list[str] = []
        while len(found) < number:
            found += [text for text in corpus.texts(kind, number) if words.isdisjoint(text.split())]
        return found[:number]

    texts = [*plain("short", count - count // 4), *plain("doc", count // 4)]
    short, docs = list(range(count - count // 4)), list(range(count - count // 4, count))
    faulty: dict[Fault, list[int]] = {}
    for fault in WORDS:
        own = [f"{text} {WORDS[fault]}" for text in plain("short", max(2, count // 40))]
        faulty[fault] = list(range(len(texts), len(texts) + len(own)))
        texts += own
    return Pool(texts, short, docs, faulty)


class Questions:
    """Draws questions at random."""

    def __init__(self, pool: Pool, models: Sequence[str], draw: random.Random) -> None:
        self._pool, self._models, self._draw = pool, models, draw

    def next(self, weights: dict[str, float]) -> ManifestKey:
        kind = self._draw.choices(list(weights), list(weights.values()))[0]
        model = self._draw.choice(list(self._models))
        if kind in LOOKING:
            return ManifestKey(kind, method="GET", path=kind)
        if kind in REFUSED:
            return self._refused(kind, model)
        if kind in FAULTY:
            return self._faulty(kind, model)
        if kind in MISBEHAVING:
            return self._misbehaving(kind, model)
        if kind == "no model named":
            return self._of(kind, self._models[0], self._some(self._pool.short, 2), names_model=False)
        many = {"32 short": 32, "200 short": 200, "32 docs": 32}.get(kind, 1)
        rows = self._pool.docs if "doc" in kind else self._pool.short
        return self._of(kind, model, self._some(rows, many))

    def with_fault(self, fault: Fault, model: str) -> ManifestKey:
        """Return a question whose text has the word of a fault that also wants its switch on; it is answered right."""
        return self._of(f"planted {fault}", model, self._some(self._pool.faulty[fault], 1))

    def _some(self, rows: Sequence[int], count: int) -> tuple[int, ...]:
        return tuple(self._draw.choices(rows, k=count))

    def _of(
        self, kind: str, model: str, rows: tuple[int, ...], *, names_model: bool = True, **more: Any
    ) -> ManifestKey:
        texts = [self._pool.texts[row] for row in rows]
        fields: dict[str, Any] = {"input": texts if len(texts) > 1 or self._draw.random() < 0.5 else texts[0]}
        if names_model:
            fields["model"] = model
        if self._draw.random() < 0.5:
            fields["encoding_format"] = "base64"
        return ManifestKey(kind, json.dumps(fields).encode(), model=model, rows=rows, **more)

    def _faulty(self, kind: str, model: str) -> ManifestKey:
        fails = kind == "one bad input"
        fault = self._draw.choice(FAILING if fails else PASSING)
        others = self._some(self._pool.short, self._draw.choice((0, 0, 1, 3)))
        rows = (*others, *self._some(self._pool.faulty[fault], 1))
        status, code = (500, "internal_error") if fails else (200, None)
        return self._of(kind, model, rows, status=status, code=code)

    def _misbehaving(self, kind: str, model: str) -> ManifestKey:
        if kind == "slow writer":
            rows = self._some(self._pool.short, self._draw.choice((1, 32)))
            return self._of(kind, model, rows, takes_s=self._draw.uniform(0.3, 2.0))
        waits = kind == "gone while it waits"
        return self._of(
            kind,
            model,
            self._some(self._pool.docs, 16),
            hangs_up_after_s=self._draw.uniform(0.0, 0.3),
            sent=1.0 if waits else self._draw.uniform(0.0, 0.95),
        )

    def _refused(self, kind: str, model: str) -> ManifestKey:
        text = self._pool.texts[self._some(self._pool.short, 1)[0]]
        doc = "word " * 300
        many = [doc] * (MAX_REQUEST_TOKENS // 256 + 2)
        bodies: dict[str, tuple[Any, int, str]] = {
            "unknown model": ({"model": "nobody", "input": text}, 404, "model_not_found"),
            "bad JSON": ('{"input": "' + text, 400, "invalid_json"),
            "no inputs": ({"model": model, "input": []}, 400, "invalid_input"),
            "null input": ({"model": model, "input": [text, None]}, 400, "invalid_input"),
            "too many tokens": ({"model": model, "input": many}, 400, "max_tokens_per_request"),
            "too long": ({"model": model, "input": doc, "truncate": False}, 400, "context_length_exceeded"),
            "dimensions": ({"model": model, "input": text, "dimensions": 7}, 400, "invalid_dimensions"),
            "unknown route": ({"input": text}, 404, "unknown_url"),
        }
        fields, status, code = bodies[kind]
        body = fields if isinstance(fields, str) else json.dumps(fields)
        path = "/v1/embedding" if kind == "unknown route" else EMBEDDINGS
        return ManifestKey(kind, body.encode(), status=status, code=code, model=model, path=path)


def fault_of(question: ManifestKey, reply: Reply, pool: Pool) -> str:
    """Return what is wrong with an answer of the right status; empty where nothing is."""
    if question.path != EMBEDDINGS and question.status == 200:
        return ""
    try:
        body = json.loads(reply.body)
        if question.status != 200:
            found = body["error"]["code"]
            return "" if found == question.code else f"code {found} for {question.code}"
        return _fault_of_vectors(question, body, pool)
    except (ValueError, KeyError, TypeError) as error:
        return f"not in the contract's form: {type(error).__name__}: {error}"


def _fault_of_vectors(question: ManifestKey, body: dict[str, Any], pool: Pool) -> str:
    if [item["index"] for item in body["data"]] != list(range(len(question.rows))):
        return f"{len(body['data'])} items for {len(question.rows)} inputs"
    expected = pool.vectors[question.model][list(question.rows)]
    found = np.stack([_vector(item["embedding"]) for item in body["data"]])
    if found.shape != expected.shape or not np.isfinite(found).all():
        return f"vectors of shape {found.shape}, or not finite"
    lowest = float(np.einsum("ij,ij->i", found, expected).min())
    return "" if lowest > TRUE else f"another vector: cosine {lowest:.4f}"


def _vector(value: str | list[float]) -> NDArray[np.float32]:
    if isinstance(value, str):
        return np.frombuffer(base64.b64decode(value, validate=True), dtype="<f4")
    return np.array(value, dtype=np.float32)


def vectors_in(reply: Reply) -> NDArray[np.float32]:
    """Return an answer's vectors, float32 of shape (inputs, dimension)."""
    return np.stack([_vector(item["embedding"]) for item in json.loads(reply.body)["data"]])
