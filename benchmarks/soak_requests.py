"""The requests of the soak test, and the response that each must get in the end."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.reference import decode_vector
from benchmarks.texts import Corpus
from tests.faults.planted import WORDS

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from benchmarks.soak_client import Response
    from benchmarks.texts import Kind
    from tests.faults.planted import Fault

EMBEDDINGS = "/v1/embeddings"
MIN_COSINE = 0.999
"""A vector with at least this cosine to the reference of a text is the vector of this text."""
MAX_SIMILARITY = 0.98
"""Texts whose vectors have a higher cosine are not used, because their vectors could be confused."""
MAX_REQUEST_TOKENS = 20_000
RECOVERED: tuple[Fault, ...] = ("nan", "slow")
"""Failures that a text causes, after which the response is correct."""
FATAL: tuple[Fault, ...] = ("raise", "memory-one", "nan-always", "exit")
"""Failures that a text causes, after which the response is 500."""

# Kinds of requests, with their weights.
VALID = {
    "short": 36.0, "doc": 10.0, "32 short": 8.0, "200 short": 1.5, "32 docs": 2.0, "default model": 4.0,
}  # fmt: skip
INVALID = {
    "unknown model": 3.0, "bad JSON": 3.0, "no inputs": 2.0, "null input": 1.0, "too many tokens": 0.7,
    "too long": 1.5, "dimensions": 1.0, "unknown route": 1.0,
}  # fmt: skip
GET = {"/health": 2.0, "/metrics": 0.5, "/v1/models": 1.0}
MISBEHAVING = {"slow writer": 2.0, "disconnect while waiting": 4.0, "disconnect while sending": 2.0}
FAILING = {"input that fails": 4.0, "input that recovers": 2.5}


@dataclass(frozen=True, slots=True)
class Request:
    """A request, and the response that it must get in the end."""

    kind: str
    body: bytes = b""
    status: int = 200
    code: str | None = None
    """Code of the expected error."""
    model: str = ""
    """Alias of the model. Empty: no model is involved."""
    rows: tuple[int, ...] = ()
    """Texts of the pool whose vectors are expected."""
    method: str = "POST"
    path: str = EMBEDDINGS
    send_s: float = 0.0
    """The client sends the body over this time, in seconds."""
    disconnect_after_s: float | None = None
    """The client disconnects after this time instead of waiting for a response."""
    sent_share: float = 1.0
    """Share of the body that is sent before the client disconnects."""


@dataclass(slots=True)
class Pool:
    """Texts, and their vectors by model."""

    texts: list[str]
    short: list[int]
    docs: list[int]
    faulty: dict[Fault, list[int]]
    """Texts that cause a failure."""
    vectors: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """float32 of shape (texts, dimension), with rows of length 1."""

    def remove_similar(self, vectors: NDArray[np.float32]) -> int:
        """Stop using texts that are too similar to another text. Return how many texts are still used."""
        is_similar = np.triu(vectors @ vectors.T, 1) > MAX_SIMILARITY
        removed = set(np.flatnonzero(is_similar.any(axis=0)).tolist())

        def kept(rows: list[int]) -> list[int]:
            return [row for row in rows if row not in removed]

        self.short, self.docs = kept(self.short), kept(self.docs)
        self.faulty = {fault: kept(rows) for fault, rows in self.faulty.items()}
        return len(self.texts) - len(removed)


def make_pool(count: int, seed: int) -> Pool:
    """Return a pool of `count` texts, a quarter of them documents, and some texts for each failure."""
    corpus, words = Corpus(seed), set(WORDS.values())

    def draw(kind: Kind, number: int) -> list[str]:
        """Return texts without the words that cause failures."""
        texts: list[str] = []
        while len(texts) < number:
            texts += [text for text in corpus.texts(kind, number) if words.isdisjoint(text.split())]
        return texts[:number]

    texts = [*draw("short", count - count // 4), *draw("doc", count // 4)]
    short, docs = list(range(count - count // 4)), list(range(count - count // 4, count))
    faulty: dict[Fault, list[int]] = {}
    for fault in WORDS:
        new = [f"{text} {WORDS[fault]}" for text in draw("short", max(2, count // 40))]
        faulty[fault] = list(range(len(texts), len(texts) + len(new)))
        texts += new
    return Pool(texts, short, docs, faulty)


class RequestFactory:
    """Makes random requests."""

    def __init__(self, pool: Pool, models: Sequence[str], random: random.Random) -> None:
        self.models = models
        self._pool, self._random = pool, random

    def draw(self, weights: dict[str, float]) -> Request:
        """Return a request of a random kind."""
        kind = self._random.choices(list(weights), list(weights.values()))[0]
        model = self._random.choice(list(self.models))
        if kind in GET:
            return Request(kind, method="GET", path=kind)
        if kind in INVALID:
            return self._invalid(kind, model)
        if kind in FAILING:
            return self._failing(kind, model)
        if kind in MISBEHAVING:
            return self._misbehaving(kind, model)
        if kind == "default model":
            return self._embed(kind, self.models[0], self._choose(self._pool.short, 2), name_model=False)
        count = {"32 short": 32, "200 short": 200, "32 docs": 32}.get(kind, 1)
        rows = self._pool.docs if "doc" in kind else self._pool.short
        return self._embed(kind, model, self._choose(rows, count))

    def with_fault(self, fault: Fault, model: str) -> Request:
        """Return a request whose text causes a failure if the fault is armed. Its final response is correct."""
        return self._embed(f"injected {fault}", model, self._choose(self._pool.faulty[fault], 1))

    def _choose(self, rows: Sequence[int], count: int) -> tuple[int, ...]:
        return tuple(self._random.choices(rows, k=count))

    def _embed(
        self, kind: str, model: str, rows: tuple[int, ...], *, name_model: bool = True, **fields: Any
    ) -> Request:
        texts = [self._pool.texts[row] for row in rows]
        content: dict[str, Any] = {"input": texts if len(texts) > 1 or self._random.random() < 0.5 else texts[0]}
        if name_model:
            content["model"] = model
        if self._random.random() < 0.5:
            content["encoding_format"] = "base64"
        return Request(kind, json.dumps(content).encode(), model=model, rows=rows, **fields)

    def _failing(self, kind: str, model: str) -> Request:
        is_fatal = kind == "input that fails"
        fault = self._random.choice(FATAL if is_fatal else RECOVERED)
        others = self._choose(self._pool.short, self._random.choice((0, 0, 1, 3)))
        rows = (*others, *self._choose(self._pool.faulty[fault], 1))
        status, code = (500, "internal_error") if is_fatal else (200, None)
        return self._embed(kind, model, rows, status=status, code=code)

    def _misbehaving(self, kind: str, model: str) -> Request:
        if kind == "slow writer":
            rows = self._choose(self._pool.short, self._random.choice((1, 32)))
            return self._embed(kind, model, rows, send_s=self._random.uniform(0.3, 2.0))
        return self._embed(
            kind,
            model,
            self._choose(self._pool.docs, 16),
            disconnect_after_s=self._random.uniform(0.0, 0.3),
            sent_share=1.0 if kind == "disconnect while waiting" else self._random.uniform(0.0, 0.95),
        )

    def _invalid(self, kind: str, model: str) -> Request:
        text = self._pool.texts[self._choose(self._pool.short, 1)[0]]
        long = "word " * 300
        many = [long] * (MAX_REQUEST_TOKENS // 256 + 2)
        contents: dict[str, tuple[Any, int, str]] = {
            "unknown model": ({"model": "unknown", "input": text}, 404, "model_not_found"),
            "bad JSON": ('{"input": "' + text, 400, "invalid_json"),
            "no inputs": ({"model": model, "input": []}, 400, "invalid_input"),
            "null input": ({"model": model, "input": [text, None]}, 400, "invalid_input"),
            "too many tokens": ({"model": model, "input": many}, 400, "max_tokens_per_request"),
            "too long": ({"model": model, "input": long, "truncate": False}, 400, "context_length_exceeded"),
            "dimensions": ({"model": model, "input": text, "dimensions": 7}, 400, "invalid_dimensions"),
            "unknown route": ({"input": text}, 404, "unknown_url"),
        }
        content, status, code = contents[kind]
        body = content if isinstance(content, str) else json.dumps(content)
        path = "/v1/embedding" if kind == "unknown route" else EMBEDDINGS
        return Request(kind, body.encode(), status=status, code=code, model=model, path=path)


def find_error(request: Request, response: Response, pool: Pool) -> str:
    """Describe the error in a response of the expected status. Return an empty string if there is none."""
    if request.path != EMBEDDINGS and request.status == 200:
        return ""
    try:
        content = json.loads(response.body)
        if request.status != 200:
            code = content["error"]["code"]
            return "" if code == request.code else f"code {code} instead of {request.code}"
        return _find_vector_error(request, response, pool)
    except (ValueError, KeyError, TypeError) as error:
        return f"malformed response: {type(error).__name__}: {error}"


def parse_vectors(response: Response) -> NDArray[np.float32]:
    """Return the vectors of a response, float32 of shape (inputs, dimension)."""
    data = json.loads(response.body)["data"]
    if [item["index"] for item in data] != list(range(len(data))):
        raise ValueError("The items are not in order.")
    return np.stack([decode_vector(item["embedding"]) for item in data])


def _find_vector_error(request: Request, response: Response, pool: Pool) -> str:
    expected = pool.vectors[request.model][list(request.rows)]
    vectors = parse_vectors(response)
    if vectors.shape != expected.shape:
        return f"vectors of shape {vectors.shape} instead of {expected.shape}"
    if not np.isfinite(vectors).all():
        return "vectors that are not finite"
    lowest = float(np.einsum("ij,ij->i", vectors, expected).min())
    return "" if lowest > MIN_COSINE else f"wrong vector: cosine {lowest:.4f}"
