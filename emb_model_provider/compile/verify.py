"""Is a compiled model the same model? Compared with sentence-transformers at fp32, before it may serve.

Runs in the compile process, over the code that serves: its tokenization and its backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from emb_model_provider.backends.base import Fidelity, TokenBatch
from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.compile.probes import PROBES, long_probes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer

    from emb_model_provider.backends.base import Backend, ModelDescription

LEAST_COSINE = 0.999
"""Below this, on any probe text, an artifact is refused."""
_NORM_TOLERANCE = 0.05
"""Relative. Vectors that are not normalized by the model are sent with the length they have."""
LONGEST_COMPARED = 4096
"""Tokens. Comparing a text of 32,000 tokens at fp32 would take many minutes on a CPU."""
_BATCH = 16
_PROMPTED = slice(20, 40)
"""The probe texts that each of a model's prompts is tried on."""


@dataclass(frozen=True, slots=True)
class Case:
    """Probe texts under one prompt, and the vectors that they must get."""

    texts: Sequence[str]
    prompt: str
    expected: NDArray[np.float32]


class UntrueError(Exception):
    """A compiled model's vectors are not the model's; the message says how far off they are."""


def reference_cases(pipeline: SentenceTransformer, description: ModelDescription) -> list[Case]:
    """Let sentence-transformers embed the probe texts. `pipeline` is in fp32; its length limit is set here."""
    limit = _limit(description)
    pipeline.max_seq_length = limit
    wanted: list[tuple[Sequence[str], str]] = [(PROBES, ""), (long_probes(limit), "")]
    wanted += [(PROBES[_PROMPTED], prompt) for prompt in description.prompts.values() if prompt]
    return [Case(texts, prompt, _reference(pipeline, texts, prompt)) for texts, prompt in wanted]


def compare(backend: Backend, cases: Sequence[Case], *, exact: bool = True) -> Fidelity:
    """Embed the cases, each text in a batch of mixed lengths and alone, and return the cosines to the reference.

    `exact` is for a model that is to be the same; a quantized one is measured, and judged by whoever serves it.

    Raises: UntrueError where a vector is not finite or has another size, or, if `exact`, is not near enough.
    """
    tokenization = Tokenization(backend.description)
    limit = _limit(backend.description)
    cosines: list[NDArray[np.float64]] = []
    for case in cases:
        encoded = tokenization.encode(list(case.texts), prompt=case.prompt, truncate="END", max_tokens=limit)
        for size in (_BATCH, 1):
            rows = [
                backend.embed(
                    TokenBatch(
                        ids=encoded.ids[start : start + size],
                        prompt_lengths=encoded.prompt_lengths[start : start + size],
                    )
                )
                for start in range(0, len(case.texts), size)
            ]
            cosines.append(
                _cosines(np.concatenate(rows), case, "in a batch" if size > 1 else "alone", exact=exact)
            )
    found = np.concatenate(cosines)
    return Fidelity(
        min_cosine=float(found.min()),
        mean_cosine=float(found.mean()),
        texts=sum(len(case.texts) for case in cases),
    )


def _limit(description: ModelDescription) -> int:
    return min(description.max_length, LONGEST_COMPARED)


def _reference(pipeline: SentenceTransformer, texts: Sequence[str], prompt: str) -> NDArray[np.float32]:
    vectors = pipeline.encode(
        list(texts),
        prompt=prompt,
        batch_size=8 if len(texts) > _BATCH else 1,
        show_progress_bar=False,
        convert_to_numpy=True,
        normalize_embeddings=False,
    )
    return np.asarray(vectors, dtype=np.float32)


def _cosines(vectors: NDArray[np.float32], case: Case, how: str, *, exact: bool) -> NDArray[np.float64]:
    if vectors.shape != case.expected.shape:
        raise UntrueError(f"its vectors have {vectors.shape[1]} values, not {case.expected.shape[1]}")
    ours, theirs = vectors.astype(np.float64), case.expected.astype(np.float64)
    bad = ~np.isfinite(ours).all(axis=1)
    if bad.any():
        raise UntrueError(
            f"{int(bad.sum())} of {len(ours)} vectors are not finite ({how}, {case.texts[int(bad.argmax())][:30]!r})"
        )
    our_norms, their_norms = np.linalg.norm(ours, axis=1), np.linalg.norm(theirs, axis=1)
    # A zero vector has no direction: it is only asked to be zero, too.
    products = (ours * theirs).sum(axis=1) / np.maximum(our_norms * their_norms, 1e-30)
    cosines: NDArray[np.float64] = np.where(their_norms > 0, products, (our_norms == 0).astype(np.float64))
    if not exact:
        return cosines
    worst = int(cosines.argmin())
    if cosines[worst] < LEAST_COSINE:
        raise UntrueError(
            f"cosine {cosines[worst]:.5f} to sentence-transformers at fp32 is less than {LEAST_COSINE} "
            f"({how}, {case.texts[worst][:30]!r})"
        )
    off = np.abs(our_norms - their_norms) > _NORM_TOLERANCE * their_norms
    if off.any():
        row = int(off.argmax())
        raise UntrueError(
            f"a vector has length {our_norms[row]:.4g} where the model's has {their_norms[row]:.4g} "
            f"({how}, {case.texts[row][:30]!r})"
        )
    return cosines
