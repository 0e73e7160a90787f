"""Compares the vectors of a backend with reference vectors at fp32, and decides whether the model is served.

It uses the tokenization and the backends that serve requests.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from emb_model_provider.backends.base import Calibration, Fidelity, TokenBatch
from emb_model_provider.backends.output_types import OUTPUT_TYPES, convert, measure_ranges, range_of
from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.errors import LoadError
from emb_model_provider.fidelity.texts import corpus, long_probes, probes
from emb_model_provider.formatting import format_cosine

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import ArrayLike, NDArray

    from emb_model_provider.backends.base import Backend, ComputePrecision, ModelDescription
    from emb_model_provider.model_spec import ModelSpec

MIN_COSINE = 0.999
"""The lowest cosine, on any text, of an artifact that must equal its reference."""
AUTO_MIN_COSINE = 0.999
"""The floor of `auto`, however low the configured floors are, because its user did not trade accuracy for speed."""
SETTING = "EMB_PROVIDER_FIDELITY_FLOORS"
LONGEST_COMPARED = 4096
"""In tokens. Comparing a text of 32,000 tokens at fp32 takes many minutes on a CPU."""
CORPUS_S = 60.0
"""Seconds that embedding the corpus at fp32 may take, approximately. A slow model embeds a part of the corpus."""
REFERENCE_CORPUS_S = 10.0
"""Likewise, for a model that has nothing to be compared with, whose first load would take much longer otherwise."""
NEIGHBORS = 10

_MORE_ACCURATE: Mapping[str, str] = {
    "int4": "int8, bf16, fp16 or fp32",
    "int8": "bf16, fp16 or fp32",
    "bf16": "fp16 or fp32",
    "fp16": "fp32",
}
_NORM_TOLERANCE = 0.05
"""Relative tolerance of vector norms, which matter because not every model normalizes its vectors."""
_SMALLEST = 1e-30
"""Keeps divisions by the norm of a zero vector finite."""
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
    """Shape (texts, dimension)."""
    neighbors: bool = False
    """Whether to compare the neighbors among the texts. Such texts are many and ordinary: they are embedded in
    batches only, not also one by one."""


class MismatchError(Exception):
    """The vectors of a backend are not those of the reference; the message contains the difference."""


class AccuracyError(LoadError):
    """The lowest cosine of a model to fp32 is below its floor."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
        """The measured value and the floor, for a note on the precision that is used instead."""


# --- measuring ----------------------------------------------------------------------------------------


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
        return sum(map(len, tokenization.encode(texts, max_tokens=limit).ids))

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

    If not `exact`, vectors may differ from the reference, and the difference is only measured.

    Raises:
        MismatchError: A vector is not finite or has another size or, if `exact`, differs from the reference.
    """
    tokenization = Tokenization(backend.description)
    measured: list[NDArray[np.float64]] = []
    overlap, correlation = None, None
    calibrating: list[NDArray[np.float32]] = []
    neighbors: NDArray[np.float32] | None = None
    for case in cases:
        for size in (_BATCH,) if case.neighbors else (_BATCH, 1):
            vectors = embed_texts(backend, tokenization, case.texts, case.prompt, batch_size=size)
            measured.append(_compare(vectors, case, "in a batch" if size > 1 else "alone", exact=exact))
            if case.neighbors:
                neighbors = vectors
                ours, theirs = similarities(vectors), similarities(case.expected)
                overlap, correlation = neighbor_overlap(ours, theirs), spearman(ours, theirs)
            elif size > 1:
                calibrating.append(vectors)
    every = np.concatenate(measured)
    return Fidelity(
        min_cosine=float(every.min()),
        mean_cosine=float(every.mean()),
        texts=sum(len(case.texts) for case in cases),
        top10_overlap=overlap,
        spearman=correlation,
        calibration=calibrate(np.concatenate(calibrating), neighbors)
        if calibrating and neighbors is not None
        else None,
    )


def measure_reference(backend: Backend, *, corpus_s: float = REFERENCE_CORPUS_S) -> Fidelity:
    """Return the fidelity of the reference itself, which is exact, with its calibration.

    Args:
        backend: The model at fp32.
        corpus_s: Seconds that embedding the corpus may take, approximately.
    """
    tokenization = Tokenization(backend.description)
    embed_texts(backend, tokenization, probes()[:_BATCH], "")  # warms up
    started = time.perf_counter()
    vectors = embed_texts(backend, tokenization, probes(), "")
    per_text = (time.perf_counter() - started) / len(probes())
    texts = corpus(corpus_s / max(per_text * len(corpus()), 1e-6))
    calibration = calibrate(vectors, embed_texts(backend, tokenization, texts, ""))
    return Fidelity(min_cosine=1.0, mean_cosine=1.0, texts=len(probes()) + len(texts), calibration=calibration)


def calibrate(sample: NDArray[np.float32], neighbors: NDArray[np.float32]) -> Calibration:
    """Return the ranges of integers for the vectors of a model, and the cost of each type of values.

    The ranges come from other texts than those whose neighbors are compared.

    Args:
        sample: Vectors of the probes, before any normalization.
        neighbors: Vectors of the corpus, likewise.
    """
    spread, unscaled_range = measure_ranges(sample)
    calibration = Calibration(spread, unscaled_range, {})
    unit = neighbors / np.maximum(np.linalg.norm(neighbors, axis=1, keepdims=True), np.float32(_SMALLEST))
    value_range = range_of(calibration, unit.shape[1], normalized=True)
    expected = similarities(unit)
    kept: dict[str, float] = {}
    for kind in OUTPUT_TYPES[1:]:
        values = convert(unit, kind, value_range)
        if kind in ("binary", "ubinary"):
            signs = np.unpackbits(values.view(np.uint8) ^ np.uint8(128 if kind == "binary" else 0), axis=1) * 2.0 - 1.0
            # The more signs are equal, the lower is the Hamming distance.
            similar = signs @ signs.T
        else:
            similar = similarities(values)
        overlap = neighbor_overlap(similar, expected)
        if overlap is not None:
            kept[kind] = overlap
    return replace(calibration, top10_overlap=kept)


def embed_texts(
    backend: Backend, tokenization: Tokenization, texts: Sequence[str], prompt: str, *, batch_size: int = _BATCH
) -> NDArray[np.float32]:
    """Return the vectors of a backend as it would serve them: float32 of shape (texts, dimension)."""
    limit = comparison_limit(backend.description)
    encoded = tokenization.encode(texts, prompt=prompt, max_tokens=limit)
    vectors, start = [], 0
    while start < len(encoded.ids):
        longest = max(map(len, encoded.ids[start : start + batch_size]))
        rows = slice(start, start + max(1, min(batch_size, _BATCH_TOKENS // longest)))
        vectors.append(backend.embed(TokenBatch(ids=encoded.ids[rows], prompt_lengths=encoded.prompt_lengths[rows])))
        start = rows.stop
    return np.concatenate(vectors)


def comparison_limit(description: ModelDescription) -> int:
    """Return the length in tokens at which texts are truncated for the comparison."""
    return min(description.max_length, LONGEST_COMPARED)


def check_accuracy(
    spec: ModelSpec, computed: ComputePrecision, fidelity: Fidelity | None, floors: Mapping[str, float], *, name: str
) -> None:
    """Check a model's lowest cosine to fp32 against its floor. A model that was not measured passes.

    The floor is that of the requested precision, whatever the model computes in; for `auto`, it is that of the
    precision that was chosen. `name` is that of the repository, for the message; the name in the settings can be that of
    a directory, such as a commit hash.

    Raises:
        AccuracyError: It is below the floor. The message says which settings to change.
    """
    precision = computed if spec.precision == "auto" else spec.precision
    floor = floors[precision]
    if spec.precision == "auto" and computed != "fp32":
        floor = max(AUTO_MIN_COSINE, floor)
    if fidelity is None or fidelity.min_cosine >= floor:
        return
    advice = "Lower that floor."
    if precision in _MORE_ACCURATE:
        advice = (
            "Set the precision (`--precision`, EMB_PROVIDER_MODEL_PRECISION, or `precision` in the mapping) to "
            f"{_MORE_ACCURATE[precision]}, or lower that floor."
        )
    cosine = format_cosine(fidelity.min_cosine)
    raise AccuracyError(
        f"{name} is not accurate enough at {precision}: its lowest cosine to fp32 is {cosine} over "
        f"{fidelity.texts} texts, and the floor of {precision} in {SETTING} is {floor:g}. {advice}",
        reason=f"its lowest cosine to fp32 at {computed} is {cosine}, below {floor:g}",
    )


# --- metrics ------------------------------------------------------------------------------------------


def cosines(ours: ArrayLike, theirs: ArrayLike) -> NDArray[np.float64]:
    """Return the cosine of each row of `ours` to the same row of `theirs`: float64 of shape (rows,).

    A zero vector has no direction, so if a row of `theirs` is zero, the result is 1 if that of `ours` is zero, else 0.
    """
    left, right = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    our_norms, their_norms = np.linalg.norm(left, axis=1), np.linalg.norm(right, axis=1)
    products = (left * right).sum(axis=1) / np.maximum(our_norms * their_norms, _SMALLEST)
    result: NDArray[np.float64] = np.where(their_norms > 0, products, (our_norms == 0).astype(np.float64))
    return result


def similarities(vectors: ArrayLike) -> NDArray[np.float64]:
    """Return the cosines of all pairs of rows: float64 of shape (rows, rows)."""
    rows = np.asarray(vectors, dtype=np.float64)
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), _SMALLEST)
    result: NDArray[np.float64] = unit @ unit.T
    return result


def neighbor_overlap(ours: NDArray[np.float64], theirs: NDArray[np.float64], count: int = NEIGHBORS) -> float | None:
    """Return the mean share of each text's `count` nearest neighbors in `theirs` that are also nearest in `ours`.

    Both are `similarities`. A text is not its own neighbor, and of equally near texts the first ones count. With fewer
    other texts, all of them are neighbors; without any, the result is None.
    """
    texts = len(ours)
    count = min(count, texts - 1)
    if count < 1:
        return None
    kept = _nearest(ours, count) & _nearest(theirs, count)
    return float(kept.sum() / (count * texts))


def spearman(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float | None:
    """Return Spearman's rank correlation of the similarities of all pairs of different texts, -1 to 1.

    It is None if it is undefined, because there are fewer than three texts or all pairs are equally similar.
    """
    if len(ours) < 3:
        return None
    pairs = np.triu_indices(len(ours), k=1)
    left, right = _ranks(ours[pairs]), _ranks(theirs[pairs])
    left, right = left - left.mean(), right - right.mean()
    scale = float(np.sqrt((left @ left) * (right @ right)))
    return float(left @ right) / scale if scale > 0 else None


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
            f"cosine {similar[worst]:.5f} to the reference at fp32 is less than {MIN_COSINE} "
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


def _nearest(similar: NDArray[np.float64], count: int) -> NDArray[np.bool_]:
    """Return which texts are among the nearest of each text: bool of shape (texts, texts)."""
    others = similar.copy()
    np.fill_diagonal(others, -np.inf)
    order = np.argsort(-others, axis=1, kind="stable")[:, :count]
    nearest = np.zeros(similar.shape, dtype=np.bool_)
    np.put_along_axis(nearest, order, values=True, axis=1)
    return nearest


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rank of each value, from 1; equal values share the mean of their ranks."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: NDArray[np.float64] = last - (counts - 1) / 2
    return mean[places.reshape(-1)]
