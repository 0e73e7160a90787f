"""Compares the results of a backend with those of a reference at fp32, and decides whether the model is served.

It uses the tokenization and the backends that serve requests.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from emb_model_provider.backends.arrays import finite_rows
from emb_model_provider.backends.base import Calibration, Fidelity, MultiVectorFidelity, ScoreFidelity, SparseFidelity
from emb_model_provider.backends.output_types import OUTPUT_TYPES, convert, measure_ranges, range_of
from emb_model_provider.errors import LoadError
from emb_model_provider.fidelity.cases import Runner
from emb_model_provider.fidelity.metrics import (
    cosines,
    dot_product_error,
    maxsim_error,
    neighbor_overlap,
    score_differences,
    similarities,
    spearman,
    term_overlaps,
)
from emb_model_provider.fidelity.texts import corpus, probes
from emb_model_provider.formatting import format_cosine

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import Backend, ComputePrecision, OutputName, Outputs
    from emb_model_provider.fidelity.cases import Case
    from emb_model_provider.model_spec import ModelSpec

MIN_COSINE = 0.999
"""The lowest cosine, on any text, of an artifact that must equal its reference."""
AUTO_MIN_COSINE = 0.999
"""The floor of `auto`, however low the configured floors are, because its user did not trade accuracy for speed."""
EXACT_AGREEMENT, AUTO_MIN_AGREEMENT = 0.995, 0.98
"""The lowest agreement of other outputs than dense vectors: of an artifact at fp32 that must equal its reference, and of
one at a lower precision; the latter is the floor of `auto`, too."""
SETTING, AGREEMENT_SETTING = "EMB_PROVIDER_FIDELITY_FLOORS", "EMB_PROVIDER_AGREEMENT_FLOORS"
REFERENCE_CORPUS_S = 10.0
"""Seconds that the corpus may take for a model that has nothing to be compared with, whose first load would take much
longer otherwise."""

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
_QUERIES = 8
"""Number of texts of a case that are compared as queries with all of its texts by MaxSim."""
_NAMES: Mapping[OutputName, str] = {
    "dense": "its lowest cosine",
    "scores": "the agreement of its scores",
    "sparse": "the agreement of its sparse vectors",
    "multi_vector": "the agreement of its token vectors",
}


class MismatchError(Exception):
    """The results of a backend are not those of the reference; the message contains the difference."""


class AccuracyError(LoadError):
    """A model is too far from fp32 for its floor."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
        """The measured value and the floor, for a note on the precision that is used instead."""


# --- measuring ----------------------------------------------------------------------------------------


def compare(backend: Backend, cases: Sequence[Case], *, exact: bool = True) -> Fidelity:
    """Compute the cases, each text in a batch of mixed lengths and alone, and compare with the results of the reference.

    If not `exact`, results may differ from the reference, and the difference is only measured.

    Raises:
        MismatchError: A result is not finite or has another size or, if `exact`, differs from the reference.
    """
    run = Runner(backend)
    dense = _DenseComparison()
    scores: list[ScoreFidelity] = []
    sparse: list[SparseFidelity] = []
    multi_vector: list[MultiVectorFidelity] = []
    for case in cases:
        for size in (_BATCH,) if case.neighbors else (_BATCH, 1):
            outputs, how = (
                run(case.texts, case.prompt, case.task, batch_size=size),
                "in a batch" if size > 1 else "alone",
            )
            _require_finite(outputs, case, how)
            if outputs.dense is not None:
                dense.add(outputs.dense, case, how, exact=exact)
            if outputs.scores is not None:
                scores.append(_compare_scores(outputs, case))
            if outputs.sparse is not None:
                sparse.append(_compare_sparse(outputs, case))
            if outputs.multi_vector is not None:
                multi_vector.append(_compare_multi_vector(outputs, case, how))
    fidelity = replace(
        dense.fidelity(),
        texts=sum(len(case.texts) for case in cases),
        scores=_combine_scores(scores),
        sparse=_combine_sparse(sparse),
        multi_vector=_combine_multi_vector(multi_vector),
    )
    if exact:
        _require_agreement(fidelity, backend.description.compute or backend.description.precision)
    return fidelity


@dataclass(slots=True)
class _DenseComparison:
    """Collects the comparison of dense vectors."""

    measured: list[NDArray[np.float64]] = field(default_factory=list)
    calibrating: list[NDArray[np.float32]] = field(default_factory=list)
    neighbors: NDArray[np.float32] | None = None
    overlap: float | None = None
    correlation: float | None = None

    def add(self, vectors: NDArray[np.float32], case: Case, how: str, *, exact: bool) -> None:
        self.measured.append(_compare_dense(vectors, case, how, exact=exact))
        if case.neighbors:
            self.neighbors = vectors
            ours, theirs = similarities(vectors), similarities(_expected_vectors(case))
            self.overlap, self.correlation = neighbor_overlap(ours, theirs), spearman(ours, theirs)
        elif how != "alone":
            self.calibrating.append(vectors)

    def fidelity(self) -> Fidelity:
        """Return the values of dense vectors; None if the model has none."""
        if not self.measured:
            return Fidelity(min_cosine=None, mean_cosine=None, texts=0)
        every = np.concatenate(self.measured)
        calibration = None
        if self.calibrating and self.neighbors is not None:
            calibration = calibrate(np.concatenate(self.calibrating), self.neighbors)
        return Fidelity(
            min_cosine=float(every.min()),
            mean_cosine=float(every.mean()),
            texts=0,
            top10_overlap=self.overlap,
            spearman=self.correlation,
            calibration=calibration,
        )


def _compare_scores(outputs: Outputs, case: Case) -> ScoreFidelity:
    ours, theirs = outputs.scores, case.expected.scores
    if ours is None or theirs is None or ours.shape != theirs.shape:
        raise MismatchError("its scores have another number of labels than those of the reference")
    groups = [text if isinstance(text, str) else text[0] for text in case.texts]
    if isinstance(case.texts[0], str):
        groups = [""] * len(case.texts)  # the scores of a label are compared over all texts
    return ScoreFidelity(len(case.texts), *score_differences(ours, theirs, groups))


def _combine_scores(parts: Sequence[ScoreFidelity]) -> ScoreFidelity | None:
    if not parts:
        return None
    return ScoreFidelity(
        pairs=sum(part.pairs for part in parts),
        max_difference=max(part.max_difference for part in parts),
        relative_difference=max(part.relative_difference for part in parts),
        spearman=min(part.spearman for part in parts),
    )


def _compare_sparse(outputs: Outputs, case: Case) -> SparseFidelity:
    ours, theirs = outputs.sparse or (), case.expected.sparse or ()
    overlaps = term_overlaps(ours, theirs)
    return SparseFidelity(len(overlaps), sum(overlaps) / len(overlaps), dot_product_error(ours, theirs))


def _combine_sparse(parts: Sequence[SparseFidelity]) -> SparseFidelity | None:
    if not parts:
        return None
    texts = sum(part.texts for part in parts)
    return SparseFidelity(
        texts=texts,
        term_overlap=sum(part.texts * part.term_overlap for part in parts) / texts,
        score_error=max(part.score_error for part in parts),
    )


def _compare_multi_vector(outputs: Outputs, case: Case, how: str) -> MultiVectorFidelity:
    ours, theirs = outputs.multi_vector or (), case.expected.multi_vector or ()
    for text, left, right in zip(case.texts, ours, theirs, strict=True):
        if left.shape != right.shape:
            raise MismatchError(
                f"it has {len(left)} token vectors of {left.shape[-1]} values, and its reference {len(right)} of "
                f"{right.shape[-1]} ({how}, {text[:30]!r})"
            )
    tokens = cosines(np.concatenate(ours), np.concatenate(theirs))
    return MultiVectorFidelity(len(ours), float(tokens.min(initial=1.0)), maxsim_error(ours, theirs, _QUERIES))


def _combine_multi_vector(parts: Sequence[MultiVectorFidelity]) -> MultiVectorFidelity | None:
    if not parts:
        return None
    return MultiVectorFidelity(
        texts=sum(part.texts for part in parts),
        min_cosine=min(part.min_cosine for part in parts),
        maxsim_error=max(part.maxsim_error for part in parts),
    )


def _require_finite(outputs: Outputs, case: Case, how: str) -> None:
    bad = ~finite_rows(outputs, len(case.texts))
    if bad.any():
        raise MismatchError(
            f"{int(bad.sum())} of {len(case.texts)} results are not finite ({how}, {case.texts[int(bad.argmax())][:30]!r})"
        )


def _require_agreement(fidelity: Fidelity, computed: ComputePrecision) -> None:
    """Raise MismatchError if an output, other than dense vectors, differs from the reference."""
    least = EXACT_AGREEMENT if computed == "fp32" else AUTO_MIN_AGREEMENT
    for name, value in fidelity.agreement.items():
        if name != "dense" and value < least:
            raise MismatchError(f"{_NAMES[name]} with the reference at fp32 is {value:.5f}, less than {least}")


def measure_reference(backend: Backend, *, corpus_s: float = REFERENCE_CORPUS_S) -> Fidelity:
    """Return the fidelity of the reference itself, which is exact, with its calibration.

    Args:
        backend: A model of dense vectors at fp32.
        corpus_s: Seconds that embedding the corpus may take, approximately.
    """
    run = Runner(backend)

    def embed(texts: Sequence[str]) -> NDArray[np.float32]:
        vectors = run(texts).dense
        assert vectors is not None  # noqa: S101 - the model has dense vectors
        return vectors

    embed(probes()[:_BATCH])  # warms up
    started = time.perf_counter()
    vectors = embed(probes())
    per_text = (time.perf_counter() - started) / len(probes())
    texts = corpus(corpus_s / max(per_text * len(corpus()), 1e-6))
    calibration = calibrate(vectors, embed(texts))
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


def check_accuracy(
    spec: ModelSpec,
    computed: ComputePrecision,
    fidelity: Fidelity | None,
    floors: Mapping[str, float],
    agreement_floors: Mapping[str, float],
    *,
    name: str,
) -> None:
    """Check how close a model is to fp32 against its floors. A model that was not measured passes.

    The floor is that of the requested precision, whatever the model computes in; for `auto`, it is that of the
    precision that was chosen.

    Args:
        spec: The model.
        computed: The precision that it computes in.
        fidelity: Its measured values.
        floors: The lowest cosine of dense vectors, by precision.
        agreement_floors: The lowest agreement of other outputs, by precision.
        name: The name of the repository, for the message; the name in the settings can be that of a directory, such as a
            commit hash.

    Raises:
        AccuracyError: It is below a floor. The message says which settings to change.
    """
    precision = computed if spec.precision == "auto" else spec.precision
    for output, value in (fidelity.agreement if fidelity is not None else {}).items():
        is_dense = output == "dense"
        floor = (floors if is_dense else agreement_floors)[precision]
        if spec.precision == "auto" and computed != "fp32":
            floor = max(AUTO_MIN_COSINE if is_dense else AUTO_MIN_AGREEMENT, floor)
        if value >= floor or fidelity is None:
            continue
        advice = "Lower that floor."
        if precision in _MORE_ACCURATE:
            advice = (
                "Set the precision (`--precision`, EMB_PROVIDER_MODEL_PRECISION, or `precision` in the mapping) to "
                f"{_MORE_ACCURATE[precision]}, or lower that floor."
            )
        setting = SETTING if is_dense else AGREEMENT_SETTING
        what, shown = f"{_NAMES[output]} {'to' if is_dense else 'with'} fp32", format_cosine(value)
        raise AccuracyError(
            f"{name} is not accurate enough at {precision}: {what} is {shown} over "
            f"{fidelity.texts} texts, and the floor of {precision} in {setting} is {floor:g}. {advice}",
            reason=f"{what} at {computed} is {shown}, below {floor:g}",
        )


def _expected_vectors(case: Case) -> NDArray[np.float32]:
    if case.expected.dense is None:
        raise MismatchError("the reference has no dense vectors")
    return case.expected.dense


def _compare_dense(vectors: NDArray[np.float32], case: Case, how: str, *, exact: bool) -> NDArray[np.float64]:
    """Return the cosine of each vector to its reference vector."""
    expected = _expected_vectors(case)
    if vectors.shape != expected.shape:
        raise MismatchError(f"its vectors have {vectors.shape[1]} values, not {expected.shape[1]}")
    similar = cosines(vectors, expected)
    if not exact:
        return similar
    worst = int(similar.argmin())
    if similar[worst] < MIN_COSINE:
        raise MismatchError(
            f"cosine {similar[worst]:.5f} to the reference at fp32 is less than {MIN_COSINE} "
            f"({how}, {case.texts[worst][:30]!r})"
        )
    ours, theirs = (np.linalg.norm(side.astype(np.float64), axis=1) for side in (vectors, expected))
    off = np.abs(ours - theirs) > _NORM_TOLERANCE * theirs
    if off.any():
        row = int(off.argmax())
        raise MismatchError(
            f"a vector has norm {ours[row]:.4g}, and its reference {theirs[row]:.4g} ({how}, {case.texts[row][:30]!r})"
        )
    return similar
