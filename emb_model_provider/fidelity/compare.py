"""Is a compiled model the same model? Compared with sentence-transformers at fp32, before it may serve.

Runs in the compile process, over the code that serves: its tokenization and its backend.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from emb_model_provider.backends.base import Fidelity, TokenBatch
from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.fidelity.metrics import cosines, neighbour_overlap, similarities, spearman
from emb_model_provider.fidelity.texts import PROBES, corpus, long_probes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import Backend, ModelDescription

MIN_COSINE = 0.999
"""Below this, on any text, an artifact that is to be the same model is refused."""
_NORM_TOLERANCE = 0.05
"""Relative. Vectors that are not normalized by the model are sent with the length they have."""
LONGEST_COMPARED = 4096
"""Tokens. Comparing a text of 32,000 tokens at fp32 would take many minutes on a CPU."""
CORPUS_S = 60.0
"""About the longest that embedding the corpus at fp32 may take; a slow model gets a part of it."""
_BATCH = 16
_BATCH_TOKENS = 8192
"""Padded. A batch of the longest texts would take gigabytes."""
_PROMPTED = slice(20, 40)
"""The probe texts that each of a model's prompts is tried on."""


@dataclass(frozen=True, slots=True)
class Case:
    """Texts under one prompt, and the vectors that they must get."""

    texts: Sequence[str]
    prompt: str
    expected: NDArray[np.float32]
    neighbours: bool = False
    """Whether neighbours are counted among them. Such texts are many and usual: they are run in batches only."""


class MismatchError(Exception):
    """A compiled model's vectors are not the model's; the message says how far off they are."""


def make_cases(
    embed: Callable[[Sequence[str], str], NDArray[np.float32]],
    description: ModelDescription,
    *,
    corpus_s: float = CORPUS_S,
) -> list[Case]:
    """Embed all that is compared: `embed` gives the reference's vectors of texts under a prompt.

    The time that the probes take tells how much of the corpus fits into about `corpus_s` seconds.
    """
    limit = comparison_limit(description)
    tokenization = Tokenization(description)

    def tokens(texts: Sequence[str]) -> int:
        return sum(map(len, tokenization.encode(list(texts), truncate="END", max_tokens=limit).ids))

    embed(PROBES[:_BATCH], "")  # what only the first run costs must not count as the model's speed
    started = time.perf_counter()
    cases = [Case(PROBES, "", embed(PROBES, ""))]
    speed = tokens(PROBES) / max(time.perf_counter() - started, 1e-6)
    wanted: list[tuple[Sequence[str], str]] = [(long_probes(limit), "")]
    wanted += [(PROBES[_PROMPTED], prompt) for prompt in description.prompts.values() if prompt]
    cases += [Case(texts, prompt, embed(texts, prompt)) for texts, prompt in wanted]
    texts = corpus(corpus_s * speed / tokens(corpus()))
    cases.append(Case(texts, "", embed(texts, ""), neighbours=True))
    return cases


def compare(backend: Backend, cases: Sequence[Case], *, exact: bool = True) -> Fidelity:
    """Embed the cases, each text in a batch of mixed lengths and alone, and return how near the vectors come.

    `exact` is for a model that is to be the same; a quantized one is measured, and judged by whoever serves it.

    Raises: UntrueError where a vector is not finite or has another size, or, if `exact`, is not near enough.
    """
    tokenization = Tokenization(backend.description)
    limit = comparison_limit(backend.description)
    found: list[NDArray[np.float64]] = []
    overlap, correlation = None, None
    for case in cases:
        for size in (_BATCH,) if case.neighbours else (_BATCH, 1):
            vectors = _embed(backend, tokenization, case, limit=limit, size=size)
            found.append(_checked(vectors, case, "in a batch" if size > 1 else "alone", exact=exact))
            if case.neighbours:
                ours, theirs = similarities(vectors), similarities(case.expected)
                overlap, correlation = neighbour_overlap(ours, theirs), spearman(ours, theirs)
    every = np.concatenate(found)
    return Fidelity(
        min_cosine=float(every.min()),
        mean_cosine=float(every.mean()),
        texts=sum(len(case.texts) for case in cases),
        top10_overlap=overlap,
        spearman=correlation,
    )


def embed_texts(
    backend: Backend, tokenization: Tokenization, texts: Sequence[str], prompt: str
) -> NDArray[np.float32]:
    """Return a backend's vectors of texts, as it would serve them: float32 of shape (texts, dimension)."""
    case = Case(texts, prompt, np.empty((0, 0), dtype=np.float32))
    return _embed(backend, tokenization, case, limit=comparison_limit(backend.description), size=_BATCH)


def _embed(
    backend: Backend, tokenization: Tokenization, case: Case, *, limit: int, size: int
) -> NDArray[np.float32]:
    encoded = tokenization.encode(list(case.texts), prompt=case.prompt, truncate="END", max_tokens=limit)
    vectors, start = [], 0
    while start < len(encoded.ids):
        longest = max(map(len, encoded.ids[start : start + size]))
        rows = slice(start, start + max(1, min(size, _BATCH_TOKENS // longest)))
        vectors.append(
            backend.embed(TokenBatch(ids=encoded.ids[rows], prompt_lengths=encoded.prompt_lengths[rows]))
        )
        start = rows.stop
    return np.concatenate(vectors)


def comparison_limit(description: ModelDescription) -> int:
    return min(description.max_length, LONGEST_COMPARED)


def _checked(vectors: NDArray[np.float32], case: Case, how: str, *, exact: bool) -> NDArray[np.float64]:
    """Return the cosines to what was expected. Raises: UntrueError."""
    if vectors.shape != case.expected.shape:
        raise MismatchError(f"its vectors have {vectors.shape[1]} values, not {case.expected.shape[1]}")
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise MismatchError(
            f"{int(bad.sum())} of {len(vectors)} vectors are not finite ({how}, {case.texts[int(bad.argmax())][:30]!r})"
        )
    near = cosines(vectors, case.expected)
    if not exact:
        return near
    worst = int(near.argmin())
    if near[worst] < MIN_COSINE:
        raise MismatchError(
            f"cosine {near[worst]:.5f} to sentence-transformers at fp32 is less than {MIN_COSINE} "
            f"({how}, {case.texts[worst][:30]!r})"
        )
    ours, theirs = (np.linalg.norm(side.astype(np.float64), axis=1) for side in (vectors, case.expected))
    off = np.abs(ours - theirs) > _NORM_TOLERANCE * theirs
    if off.any():
        row = int(off.argmax())
        raise MismatchError(
            f"a vector has length {ours[row]:.4g} where the model's has {theirs[row]:.4g} "
            f"({how}, {case.texts[row][:30]!r})"
        )
    return near
