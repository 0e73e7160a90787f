"""What is compared: the inputs for each kind of model, and their results with the reference."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emb_model_provider.backends.base import Outputs, TokenBatch
from emb_model_provider.backends.pairs import PairTokenization
from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.fidelity.texts import corpus, long_probes, probes, topics

if TYPE_CHECKING:
    from emb_model_provider.backends.base import Backend, ModelDescription

Texts = Sequence[str] | Sequence[tuple[str, str]]
"""Texts or, for a reranker, pairs of a query and a document."""
Compute = Callable[[Texts, str, str | None], Outputs]
"""Returns all outputs of a model for texts with a prompt and a task."""

LONGEST_COMPARED = 4096
"""In tokens. Comparing a text of 32,000 tokens at fp32 takes many minutes on a CPU."""
CORPUS_S = 60.0
"""Seconds that the corpus may take at fp32, approximately. A slow model reads a part of the corpus."""

_BATCH = 16
_BATCH_TOKENS = 8192
"""Padded tokens of a batch, because a batch of the longest texts would take gigabytes."""
_PROBES_WITH_PROMPT = slice(20, 40)
"""The probes that are also read with each prompt of the model."""
_SHORTEST = slice(20, 28)
"""Places of the probes that are used as queries, by their length."""
_OTHER_TOPICS = 5
"""Documents of other topics that a query is compared with, besides those of its own topic."""


@dataclass(frozen=True, slots=True)
class Case:
    """Inputs with one prompt and task, and their results with the reference."""

    texts: Texts
    prompt: str
    expected: Outputs
    neighbors: bool = False
    """Whether to compare the texts with each other. Such texts are many and ordinary: they are computed in batches only,
    not also one by one."""
    task: str | None = None


class Runner:
    """Computes the outputs of a backend for texts, as it would serve them. Texts are cut for the comparison."""

    def __init__(self, backend: Backend) -> None:
        description = backend.description
        self._backend = backend
        self._limit = comparison_limit(description)
        self._tokenization = Tokenization(description)
        self._pairs = PairTokenization(self._tokenization, description) if "scores" in description.outputs else None

    def __call__(self, texts: Texts, prompt: str = "", task: str | None = None, *, batch_size: int = _BATCH) -> Outputs:
        """Return all outputs, computed in batches of a size."""
        whole = self.encode(texts, prompt, task)
        description = self._backend.description
        rows, start = [], 0
        while start < len(whole.ids):
            longest = max(map(len, whole.ids[start : start + batch_size]))
            stop = min(len(whole.ids), start + max(1, min(batch_size, _BATCH_TOKENS // longest)))
            outputs = self._backend.run(whole.select(range(start, stop)))
            rows += [outputs.row(row, description.outputs) for row in range(stop - start)]
            start = stop
        return Outputs.of_rows(description.outputs, rows)

    def encode(self, texts: Texts, prompt: str = "", task: str | None = None) -> TokenBatch:
        """Return texts as tokens."""
        return encode(self._tokenization, self._pairs, texts, prompt, task, limit=self._limit)


def encode(
    tokenization: Tokenization,
    pairs: PairTokenization | None,
    texts: Texts,
    prompt: str = "",
    task: str | None = None,
    *,
    limit: int,
) -> TokenBatch:
    """Return texts or pairs, cut to `limit` tokens, as a batch."""
    if pairs is not None and not isinstance(texts[0], str):
        return pairs.encode(texts, prompt=prompt, long_documents="cut", max_tokens=limit).inputs.batch()  # type: ignore[arg-type]  # all are pairs
    return tokenization.encode(texts, prompt=prompt, max_tokens=limit, task=task).batch(task=task)  # type: ignore[arg-type]  # all are texts


def comparison_limit(description: ModelDescription) -> int:
    """Return the length in tokens at which texts are truncated for the comparison."""
    return min(description.max_length, LONGEST_COMPARED)


def make_cases(compute: Compute, description: ModelDescription, *, corpus_s: float = CORPUS_S) -> list[Case]:
    """Compute the probes and the corpus with the reference model.

    Args:
        compute: The reference.
        description: The description of the model.
        corpus_s: Seconds that the corpus may take. The time for the probes decides how much of it is used.
    """
    limit = comparison_limit(description)
    tokenization = Tokenization(description)
    is_reranker = description.kind == "reranker"
    pairs = PairTokenization(tokenization, description) if is_reranker else None
    first: Texts = probe_pairs() if is_reranker else probes()

    def count_tokens(texts: Texts) -> int:
        return sum(map(len, encode(tokenization, pairs, texts, limit=limit).ids))

    compute(first[:_BATCH], "", None)  # warms up, so that one-time costs do not count as the speed of the model
    started = time.perf_counter()
    cases = [Case(first, "", compute(first, "", None))]
    speed = count_tokens(first) / max(time.perf_counter() - started, 1e-6)
    others: list[tuple[Texts, str, str | None]]
    if is_reranker:
        others = [([("How does it work?", text) for text in long_probes(limit)], "", None)]
    else:
        others = [(long_probes(limit), "", None)]
        others += [
            (probes()[_PROBES_WITH_PROMPT], prompt, name if description.kind == "multi-vector" else None)
            for name, prompt in description.prompts.items()
            if prompt
        ]
    if description.kind == "multi-vector":
        others += [(probes()[_PROBES_WITH_PROMPT], "", task) for task in ("query", "document")]
    cases += [Case(texts, prompt, compute(texts, prompt, task), task=task) for texts, prompt, task in others]
    whole: Texts = corpus_pairs() if is_reranker else corpus()
    share = corpus_s * speed / count_tokens(whole)
    texts: Texts = corpus_pairs(share) if is_reranker else corpus(share)
    cases.append(Case(texts, "", compute(texts, "", None), neighbors=True))
    return cases


def probe_pairs() -> list[tuple[str, str]]:
    """Return pairs of very different texts: each probe with one of a few others as its query."""
    texts = probes()
    queries = sorted(texts, key=len)[_SHORTEST]
    return [(queries[row // _BATCH % len(queries)], text) for row, text in enumerate(texts)]


def corpus_pairs(share: float = 1.0) -> list[tuple[str, str]]:
    """Return pairs of the corpus or, approximately, a share of it.

    The shortest text of a topic is the query for the other texts of its topic and for some of other topics.
    """
    every = list(topics().values())
    count = len(corpus(share)) // len(every[0])
    chosen = [every[i * len(every) // count] for i in range(count)]
    pairs = []
    for number, texts in enumerate(chosen):
        query = min(texts, key=len)
        others = [chosen[(number + 1 + i) % count][i % len(texts)] for i in range(_OTHER_TOPICS)]
        pairs += [(query, text) for text in (*texts, *others) if text != query]
    return pairs
