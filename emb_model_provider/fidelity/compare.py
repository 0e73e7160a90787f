"""Compares the vectors of a backend with reference vectors at fp32, before the model is served.

It uses the tokenization and the backends that serve requests.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from emb_model_provider.backends.base import Fidelity, TokenBatch
from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.fidelity.metrics import cosines, neighbor_overlap, similarities, spearman
from emb_model_provider.fidelity.texts import corpus, long_probes, probes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import Backend, ModelDescription

MIN_COSINE = 0.999
"""The lowest cosine, on any text, of an artifact that must equal its reference."""
LONGEST_COMPARED = 4096
"""In tokens. Comparing a text of 32,000 tokens at fp32 takes many minutes on a CPU."""
CORPUS_S = 60.0
"""Seconds that embedding the corpus at fp32 may take, approximately. A slow model embeds a part of the corpus."""
_NORM_TOLERANCE = 0.05
"""Relative tolerance of vector norms, which matter because not every model normalizes its vectors."""
_BATCH = 16
_BATCH_TOKENS = 8192
"""Padded tokens of a batch, because a batch of the longest texts would take gigabytes."""
_PROBES_WITH_PROMPT = slice(20, 40)
"""The probes that are also embedded with each prompt of the model."""


@dataclass(frozen=True, slots=True)
class Case:
    """Texts with one prompt, and their reference vectors."""

    texts: Sequence[str]
    prompt: str
    expected: NDArray[np.float32]
    """float32 of shape (texts, dimension)."""
    neighbors: bool = False
    """Whether to compare the neighbors among the texts. Such texts are many and ordinary: they are embedded in
    batches only, not also one by one."""


class MismatchError(Exception):
    """The vectors of a backend are not those of the reference; the message contains the difference."""


def make_cases(
    embed: Callable[[Sequence[str], str], NDArray[np.float32]],
    description: ModelDescription,
    *,
    corpus_s: float = CORPUS_S,
) -> list[Case]:
    """Embed the probes and the corpus with the reference model.

    Args:
        embed: Returns the reference vectors of texts with a prompt.
        description: The description of the model.
        corpus_s: Seconds that embedding the corpus may take. The time for the probes decides how much of the corpus
            is embedded.
    """
    limit = comparison_limit(description)
    tokenization = Tokenization(description)

    def count_tokens(texts: Sequence[str]) -> int:
        return sum(map(len, tokenization.encode(list(texts), truncate="END", max_tokens=limit).ids))

    embed(probes()[:_BATCH], "")  # warms up, so that one-time costs do not count as the speed of the model
    started = time.perf_counter()
    cases = [Case(probes(), "", embed(probes(), ""))]
    speed = count_tokens(probes()) / max(time.perf_counter() - started, 1e-6)
    inputs: list[tuple[Sequence[str], str]] = [(long_probes(limit), "")]
    inputs += [(probes()[_PROBES_WITH_PROMPT], prompt) for prompt in description.prompts.values() if prompt]
    cases += [Case(texts, prompt, embed(texts, prompt)) for texts, prompt in inputs]
    texts = corpus(corpus_s * speed / count_tokens(corpus()))
    cases.append(Case(texts, "", embed(texts, ""), neighbors=True))
    return cases


def compare(backend: Backend, cases: Sequence[Case], *, exact: bool = True) -> Fidelity:
    """Embed the cases, each text in a batch of mixed lengths and alone, and compare with the reference vectors.

    Args:
        backend: The model to compare.
        cases: Texts and reference vectors.
        exact: Whether the vectors must equal the reference. Otherwise they are only measured.

    Raises:
        MismatchError: A vector is not finite or has another size or, if `exact`, differs from the reference.
    """
    tokenization = Tokenization(backend.description)
    limit = comparison_limit(backend.description)
    measured: list[NDArray[np.float64]] = []
    overlap, correlation = None, None
    for case in cases:
        for size in (_BATCH,) if case.neighbors else (_BATCH, 1):
            vectors = _embed(backend, tokenization, case.texts, case.prompt, limit=limit, batch_size=size)
            measured.append(_compare(vectors, case, "in a batch" if size > 1 else "alone", exact=exact))
            if case.neighbors:
                ours, theirs = similarities(vectors), similarities(case.expected)
                overlap, correlation = neighbor_overlap(ours, theirs), spearman(ours, theirs)
    every = np.concatenate(measured)
    return Fidelity(
        min_cosine=float(every.min()),
        mean_cosine=float(every.mean()),
        texts=sum(len(case.texts) for case in cases),
        top10_overlap=overlap,
        spearman=correlation,
    )


def embed_texts(backend: Backend, tokenization: Tokenization, texts: Sequence[str], prompt: str) -> NDArray[np.float32]:
    """Return the vectors of a backend as it would serve them: float32 of shape (texts, dimension)."""
    limit = comparison_limit(backend.description)
    return _embed(backend, tokenization, texts, prompt, limit=limit, batch_size=_BATCH)


def comparison_limit(description: ModelDescription) -> int:
    """Return the length in tokens at which texts are truncated for the comparison."""
    return min(description.max_length, LONGEST_COMPARED)


def _embed(
    backend: Backend, tokenization: Tokenization, texts: Sequence[str], prompt: str, *, limit: int, batch_size: int
) -> NDArray[np.float32]:
    encoded = tokenization.encode(list(texts), prompt=prompt, truncate="END", max_tokens=limit)
    vectors, start = [], 0
    while start < len(encoded.ids):
        longest = max(map(len, encoded.ids[start : start + batch_size]))
        rows = slice(start, start + max(1, min(batch_size, _BATCH_TOKENS // longest)))
        vectors.append(backend.embed(TokenBatch(ids=encoded.ids[rows], prompt_lengths=encoded.prompt_lengths[rows])))
        start = rows.stop
    return np.concatenate(vectors)


def _compare(vectors: NDArray[np.float32], case: Case, how: str, *, exact: bool) -> NDArray[np.float64]:
    """Return the cosine of each vector to its reference vector."""
    if vectors.shape != case.expected.shape:
        raise MismatchError(f"its vectors have {vectors.shape[1]} values, not {case.expected.shape[1]}")
    bad = ~np.isfinite(vectors).all(axis=1)
    if bad.any():
        raise MismatchError(
            f"{int(bad.sum())} of {len(vectors)} vectors are not finite ({how}, {case.texts[int(bad.argmax())][:30]!r})"
        )
    similar = cosines(vectors, case.expected)
    if not exact:
        return similar
    worst = int(similar.argmin())
    if similar[worst] < MIN_COSINE:
        raise MismatchError(
            f"cosine {similar[worst]:.5f} to sentence-transformers at fp32 is less than {MIN_COSINE} "
            f"({how}, {case.texts[worst][:30]!r})"
        )
    ours, theirs = (np.linalg.norm(side.astype(np.float64), axis=1) for side in (vectors, case.expected))
    off = np.abs(ours - theirs) > _NORM_TOLERANCE * theirs
    if off.any():
        row = int(off.argmax())
        raise MismatchError(
            f"a vector has norm {ours[row]:.4g}, and its reference {theirs[row]:.4g} ({how}, {case.texts[row][:30]!r})"
        )
    return similar
