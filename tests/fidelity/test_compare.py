"""Vectors that differ from the reference are found, whatever the difference is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from emb_model_provider.backends.base import Outputs
from emb_model_provider.backends.output_types import measure_ranges
from emb_model_provider.fidelity.cases import LONGEST_COMPARED, Case, Runner, comparison_limit, make_cases
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
