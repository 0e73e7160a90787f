"""A compiled model that is not the model is refused, and why is said."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from emb_model_provider.backends.tokenization import Tokenization
from emb_model_provider.compiler import build as making
from emb_model_provider.compiler import export as graphs
from emb_model_provider.fidelity.compare import Case, MismatchError, compare
from emb_model_provider.fidelity.texts import PROBES, long_probes
from tests.compile.conftest import compile_here

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import ModelDescription, TokenBatch
    from tests.compile.conftest import Compiled

FAMILY = "bert-mean-normalize"


class Spoiled:
    """A backend whose vectors a test changes."""

    def __init__(self, real: Any, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> None:
        self._real, self._change, self.streams = real, change, 1
        self.description: ModelDescription = real.description

    def embed(self, batch: TokenBatch) -> NDArray[np.float32]:
        return self._change(self._real.embed(batch).copy())

    def close(self) -> None:
        self._real.close()


def _with(vectors: NDArray[np.float32], row: int, value: float) -> NDArray[np.float32]:
    vectors[row % len(vectors), 0] = value
    return vectors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda vectors: _with(vectors, 0, np.nan), "not finite"),
        (lambda vectors: _with(vectors, -1, 50.0), "less than 0.999"),
        (lambda vectors: vectors * 1.5, "length"),
        (lambda vectors: vectors[:, :-1], "47 values, not 48"),
        (lambda vectors: vectors if len(vectors) == 1 else vectors[::-1], "in a batch"),
    ],
)
def test_wrong_vectors_are_refused(
    change: Callable[[NDArray[np.float32]], NDArray[np.float32]],
    words: str,
    compiled: Callable[..., Compiled],
) -> None:
    """One that is not finite, one that points elsewhere, wrong lengths, a wrong size, rows exchanged."""
    backend = compiled(FAMILY, precision="fp32").load()
    texts = PROBES[24:44]
    encoded = Tokenization(backend.description).encode(texts, truncate="END")
    from emb_model_provider.backends.base import TokenBatch

    expected = backend.embed(TokenBatch(ids=encoded.ids, prompt_lengths=encoded.prompt_lengths))
    cases = [Case(texts, "", expected)]
    assert compare(backend, cases).min_cosine > 0.99999
    with pytest.raises(MismatchError, match=words):
        compare(Spoiled(backend, change), cases)


def test_the_probes_run_from_one_token_to_over_long(compiled: Callable[..., Compiled]) -> None:
    """Over a hundred texts, one of a single token besides special ones, some that are cut."""
    description = compiled("bundled", precision="auto").artifact.description
    encode = Tokenization(description).encode
    lengths = {len(row) for row in encode(PROBES, truncate="END").ids}
    assert len(PROBES) > 100
    assert len(set(PROBES)) == len(PROBES)
    assert min(lengths) <= 3
    assert len(lengths) > 30
    assert encode(long_probes(256), truncate="END").truncated >= 1


def test_a_graph_that_is_wrong_is_tried_another_way(
    compiled: Callable[..., Compiled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An export that fails, then one that gives other vectors, then one that is right, which is named."""
    directory = compiled(FAMILY, precision="fp32").directory

    def fails(*_: object) -> Any:
        raise RuntimeError("cannot be exported")

    ways = {"first": fails, "second": _with_other_weights, "third": graphs.traced}
    monkeypatch.setattr(graphs, "EXPORTERS", ways)
    result, _ = compile_here(directory, tmp_path, precision="fp32")
    assert result.outcome == "done"
    assert '"made_by": "third"' in (tmp_path / "manifest.json").read_text()


def test_a_model_that_no_way_gets_right_is_refused(
    compiled: Callable[..., Compiled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way is named with its reason, and there is no manifest."""
    directory = compiled(FAMILY, precision="fp32").directory
    monkeypatch.setattr(graphs, "EXPORTERS", {"spoiled": _with_other_weights})
    result, _ = compile_here(directory, tmp_path, precision="fp32")
    assert result.outcome == "refused"
    assert "spoiled: at fp32, cosine" in result.reason
    assert "less than 0.999" in result.reason
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.parametrize("way", ["tracing", "tracing, attention not fused"])
@pytest.mark.parametrize("family", ["bert-prompts-excluded", "modernbert", "qwen3-left"])
def test_each_way_gives_the_same_model(
    way: str, family: str, compiled: Callable[..., Compiled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tracing gives verifies as well."""
    directory = compiled(family, precision="fp32").directory
    monkeypatch.setattr(graphs, "EXPORTERS", {way: graphs.EXPORTERS[way]})
    result, _ = compile_here(directory, tmp_path, precision="fp32")
    assert result.outcome == "done"


def test_auto_falls_back_to_fp32_where_bf16_is_not_true(
    compiled: Callable[..., Compiled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The description says what is computed in, and a note how far bf16 was off."""
    directory = compiled(FAMILY, precision="fp32").directory
    real = making.compare

    def only_fp32(backend: Any, cases: Any, **options: Any) -> Any:
        if backend.description.precision != "fp32":
            raise MismatchError("cosine 0.5")
        return real(backend, cases, **options)

    monkeypatch.setattr(making, "compare", only_fp32)
    monkeypatch.setattr("tests.compile.conftest.native_bf16", lambda: True)
    result, _ = compile_here(directory, tmp_path, precision="auto")
    assert result.outcome == "done"
    manifest = (tmp_path / "manifest.json").read_text()
    assert '"precision": "fp32"' in manifest
    assert "computed in fp32, since it is not true enough at bf16, cosine 0.5" in manifest


def _with_other_weights(pipeline: Any, tell: Callable[[str], None]) -> Any:
    """Trace a copy of a pipeline whose embeddings were changed."""
    other = copy.deepcopy(pipeline)
    other.transformers_model.get_input_embeddings().weight.data.mul_(-0.5)
    return graphs.traced(other, tell)
