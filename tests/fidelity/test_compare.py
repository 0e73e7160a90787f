"""Results that differ from the reference are found, whatever the difference is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from emb_model_provider.backends.base import SCORES, TERM_WEIGHTS, TOKEN_VECTORS, Outputs, SparseVector
from emb_model_provider.backends.output_types import measure_ranges
from emb_model_provider.fidelity.cases import (
    LONGEST_COMPARED,
    Case,
    Runner,
    comparison_limit,
    corpus_pairs,
    make_cases,
    probe_pairs,
)
from emb_model_provider.fidelity.compare import MismatchError, compare, measure_reference
from emb_model_provider.fidelity.texts import MIN_TOPICS, corpus, probes
from tests.artifacts.helpers import FAMILY, CompiledModels
from tests.backends.helpers import description

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import ModelDescription, TokenBatch
    from emb_model_provider.backends.openvino_cpu.backend import OpenVinoBackend


class ChangedBackend:
    """A backend whose vectors a test changes."""

    streams = 1

    def __init__(self, backend: Any, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> None:
        self._backend, self._change = backend, change
        self.description: ModelDescription = backend.description
        self.memory_bytes: int = backend.memory_bytes

    def run(self, batch: TokenBatch) -> Outputs:
        return Outputs(dense=self._change(self._backend.run(batch).dense.copy()))

    def run_fp32(self, batch: TokenBatch) -> Outputs:
        return self.run(batch)

    def close(self) -> None:
        self._backend.close()


@pytest.fixture(scope="module")
def loaded(compiled: CompiledModels) -> OpenVinoBackend:
    return compiled(FAMILY).load()


@pytest.fixture(scope="module")
def cases(loaded: OpenVinoBackend) -> list[Case]:
    texts = probes()[24:44]
    return [Case(texts, "", Runner(loaded)(texts))]


def _with_value(vectors: NDArray[np.float32], row: int, value: float) -> NDArray[np.float32]:
    vectors[row % len(vectors), 0] = value
    return vectors


def test_equal_vectors_are_accepted(loaded: OpenVinoBackend, cases: list[Case]) -> None:
    fidelity = compare(loaded, cases)
    assert fidelity.min_cosine > 0.99999
    assert (fidelity.texts, fidelity.top10_overlap, fidelity.spearman) == (20, None, None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vectors: _with_value(vectors, 0, np.nan), "not finite"),
        (lambda vectors: _with_value(vectors, -1, 50.0), "less than 0.999"),
        (lambda vectors: vectors * 1.5, "norm"),
        (lambda vectors: vectors[:, :-1], "47 values, not 48"),
        (lambda vectors: vectors if len(vectors) == 1 else vectors[::-1], "in a batch"),
    ],
)
def test_wrong_vectors_are_a_mismatch(
    change: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    message: str,
    loaded: OpenVinoBackend,
    cases: list[Case],
) -> None:
    """A value that is not finite, another direction, another norm, another size, or rows in another order."""
    with pytest.raises(MismatchError, match=message):
        compare(ChangedBackend(loaded, change), cases)


def test_inexact_vectors_are_measured(loaded: OpenVinoBackend, cases: list[Case]) -> None:
    """Without `exact` only vectors that are not finite, or have another size, are a mismatch."""
    fidelity = compare(ChangedBackend(loaded, lambda v: _with_value(v, -1, 50.0)), cases, exact=False)
    assert fidelity.min_cosine < 0.9
    with pytest.raises(MismatchError, match="not finite"):
        compare(ChangedBackend(loaded, lambda v: _with_value(v, 0, np.nan)), cases, exact=False)


def test_neighbors_are_compared_for_the_corpus(loaded: OpenVinoBackend) -> None:
    texts = corpus(0)
    fidelity = compare(loaded, [Case(texts, "", Runner(loaded)(texts), neighbors=True)])
    assert fidelity.top10_overlap == 1
    assert fidelity.spearman == pytest.approx(1)


def test_the_cost_of_each_output_type_is_measured(loaded: OpenVinoBackend, cases: list[Case]) -> None:
    """With ranges from the other texts. Fewer bits keep fewer neighbors."""
    texts = corpus(0)
    calibration = compare(loaded, [*cases, Case(texts, "", Runner(loaded)(texts), neighbors=True)]).calibration
    assert calibration is not None
    assert (calibration.spread, calibration.unscaled_range) == measure_ranges(cases[0].expected.dense)
    kept = calibration.top10_overlap
    assert set(kept) == {"float16", "int8", "uint8", "binary", "ubinary"}
    assert min(kept["float16"], kept["int8"], kept["uint8"]) > 0.9 > kept["binary"] == kept["ubinary"] > 0.1


def test_the_reference_is_calibrated_too(loaded: OpenVinoBackend) -> None:
    fidelity = measure_reference(loaded, corpus_s=0)
    assert (fidelity.min_cosine, fidelity.texts) == (1.0, len(probes()) + 10 * MIN_TOPICS)
    assert fidelity.calibration is not None


def test_cases_cover_prompts_and_as_much_of_the_corpus_as_time_allows() -> None:
    """A slow model embeds the smallest part of the corpus, and each prompt once."""
    calls: list[tuple[int, str]] = []

    def embed(texts: Sequence[str], prompt: str, _task: str | None) -> Outputs:
        calls.append((len(texts), prompt))
        return Outputs(dense=np.ones((len(texts), 4), dtype=np.float32))

    model = description(prompts={"query": "query: ", "document": ""})
    cases = make_cases(embed, model, corpus_s=0)
    assert [(len(case.texts), case.prompt) for case in cases] == calls[1:]
    assert calls[1:] == [(len(probes()), ""), (3, ""), (20, "query: "), (10 * MIN_TOPICS, "")]
    assert len(make_cases(embed, model, corpus_s=1e9)[-1].texts) == len(corpus())


def test_long_texts_are_truncated_for_the_comparison() -> None:
    assert comparison_limit(description(max_length=32_768)) == LONGEST_COMPARED
    assert comparison_limit(description(max_length=512)) == 512


# --- other outputs than dense vectors -----------------------------------------------------------------------------


class FakeBackend:
    """A backend of another kind, whose results depend on the token ids alone, and which a test changes."""

    streams, memory_bytes = 1, 0

    def __init__(self, change: Callable[[Outputs], Outputs] = lambda outputs: outputs, **described: Any) -> None:
        self.description = description(**described)
        self._change = change

    def run(self, batch: TokenBatch) -> Outputs:
        sums = np.array([sum(ids) % 101 for ids in batch.ids], dtype=np.float32)
        if "scores" in self.description.outputs:
            return self._change(Outputs(scores=np.stack([sums, -sums], axis=1)[:, : len(self.description.labels)]))
        if "sparse" in self.description.outputs:
            rows = [np.unique(np.asarray(ids, dtype=np.int32), return_counts=True) for ids in batch.ids]
            return self._change(Outputs(sparse=[SparseVector(ids, n.astype(np.float32) + 0.5) for ids, n in rows]))
        vectors = [np.stack([np.sin(ids), np.cos(ids)], axis=1).astype(np.float32) for ids in batch.ids]
        return self._change(Outputs(multi_vector=vectors))

    def run_fp32(self, batch: TokenBatch) -> Outputs:
        return self.run(batch)

    def close(self) -> None:
        pass


KINDS: dict[str, dict[str, Any]] = {
    "reranker": {"kind": "reranker", "arrays": (SCORES,), "labels": ("0",)},
    "classifier": {"kind": "classifier", "arrays": (SCORES,), "labels": ("no", "yes")},
    "sparse": {"kind": "sparse", "arrays": (TERM_WEIGHTS,)},
    "multi-vector": {"kind": "multi-vector", "arrays": (TOKEN_VECTORS,), "dimension": 2},
}


def cases_of(kind: str) -> list[Case]:
    return make_cases(Runner(FakeBackend(**KINDS[kind])), description(**KINDS[kind]), corpus_s=0)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_results_of_each_kind_are_accepted(kind: str) -> None:
    """The fidelity has the values of its output, and none of dense vectors."""
    cases = cases_of(kind)
    fidelity = compare(FakeBackend(**KINDS[kind]), cases)
    assert fidelity.texts == sum(len(case.texts) for case in cases) > 100
    assert fidelity.min_cosine is None
    (agreement,) = fidelity.agreement.values()
    assert agreement == pytest.approx(1)


WRONG: list[tuple[str, Callable[[Outputs], Outputs], str]] = [
    ("reranker", lambda o: Outputs(scores=o.scores + np.float32(np.nan)), "not finite"),
    ("reranker", lambda o: Outputs(scores=-o.scores), "agreement of its scores"),
    ("classifier", lambda o: Outputs(scores=o.scores[:, :1]), "another number of labels"),
    ("classifier", lambda o: Outputs(scores=o.scores[:, ::-1]), "agreement of its scores"),
    ("sparse", lambda o: Outputs(sparse=[v.largest(1) for v in o.sparse]), "agreement of its sparse vectors"),
    (
        "sparse",
        lambda o: Outputs(sparse=[SparseVector(v.indices, v.values * np.float32(1.1)) for v in o.sparse]),
        "agreement of its sparse vectors",
    ),
    ("multi-vector", lambda o: Outputs(multi_vector=[v[1:] for v in o.multi_vector]), r"token vectors of 2 values"),
    # only those of one text, because a rotation of all vectors changes no MaxSim score
    (
        "multi-vector",
        lambda o: Outputs(multi_vector=[-o.multi_vector[0], *o.multi_vector[1:]]),
        "agreement of its token vectors",
    ),
]


@pytest.mark.parametrize(("kind", "change", "message"), WRONG)
def test_wrong_results_of_each_kind_are_a_mismatch(
    kind: str, change: Callable[[Outputs], Outputs], message: str
) -> None:
    """Values that are not finite, other values, another order, and another number of labels, terms or tokens."""
    with pytest.raises(MismatchError, match=message):
        compare(FakeBackend(change, **KINDS[kind]), cases_of(kind))


def test_inexact_results_of_other_kinds_are_measured() -> None:
    """Without `exact`, only their number and values that are not finite are a mismatch."""
    backend = FakeBackend(lambda o: Outputs(scores=o.scores * np.float32(0.5)), **KINDS["reranker"])
    fidelity = compare(backend, cases_of("reranker"), exact=False)
    assert fidelity.scores is not None
    assert fidelity.scores.relative_difference > 0.4
    assert fidelity.scores.spearman == pytest.approx(1)
    assert fidelity.agreement == {"scores": 1 - fidelity.scores.relative_difference}


def test_pairs_have_several_documents_for_each_query() -> None:
    """Otherwise a rank correlation would have no meaning."""
    for pairs in (probe_pairs(), corpus_pairs(0)):
        documents: dict[str, list[str]] = {}
        for query, document in pairs:
            documents.setdefault(query, []).append(document)
        assert min(map(len, documents.values())) >= 10
        assert all(query not in others for query, others in documents.items()) or pairs == probe_pairs()
