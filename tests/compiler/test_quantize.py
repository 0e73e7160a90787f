"""int8 and int4 weights: size, accuracy, and errors of nncf."""

from __future__ import annotations

import subprocess
import sys
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import openvino
import pytest

from emb_model_provider.artifacts.manifest import FILES, GRAPH, MANIFEST, WEIGHTS
from emb_model_provider.backends.base import INPUT_IDS, POOLING_MASK, SCORES, TOKEN_TYPES
from emb_model_provider.backends.hardware import fast_int8, native_bf16
from emb_model_provider.backends.openvino_cpu.backend import OpenVinoBackend
from emb_model_provider.backends.openvino_cpu.runtime import ACTIVATION_GROUPS
from emb_model_provider.compiler.quantize import QuantizeError, calibration_inputs, quantize
from emb_model_provider.fidelity.texts import calibration_texts, probes
from tests.artifacts.helpers import FAMILY, ONE_TOKEN, Compiled, CompiledModels, compile_here
from tests.backends.helpers import TEXTS, cosines, description, embed_texts, reference
from tests.kind_models import bert_pairs
from tests.marks import mark_slow_except

if TYPE_CHECKING:
    from pathlib import Path

    from emb_model_provider.backends.base import ComputePrecision
    from emb_model_provider.compiler.quantize import QuantizedWeights

MIN_COSINES = {"int8": 0.94, "int4": 0.7}
"""Of the small models: they lose more accuracy than trained models, because their weights are random and wide."""


def weights_size(model: Compiled) -> int:
    return (model.artifact.directory / WEIGHTS).stat().st_size


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize(
    "family", mark_slow_except([FAMILY, "bert-dense", "xlm-roberta", "mpnet", "modernbert", "qwen3-left"], FAMILY)
)
def test_quantized_families_are_close_to_fp32(
    family: str, precision: QuantizedWeights, compiled: CompiledModels, tmp_path: Path
) -> None:
    """Their graphs are smaller, and can be computed at each precision."""
    exact = compiled(family)
    texts = TEXTS + list(probes()[24:60])
    expected = embed_texts(exact.load(), texts)
    described = replace(exact.description, precision=precision)
    with warnings.catch_warnings(action="ignore"):
        graph = quantize(openvino.Core().read_model(exact.artifact.directory / GRAPH), precision, described)
    openvino.save_model(graph, tmp_path / GRAPH, compress_to_fp16=False)
    assert (tmp_path / WEIGHTS).stat().st_size < 0.4 * weights_size(exact)
    computations: list[ComputePrecision] = ["fp32", "bf16", "int8"]
    for compute in computations:
        backend = OpenVinoBackend(tmp_path / GRAPH, replace(described, compute=compute), cpus=1)
        vectors = embed_texts(backend, texts)
        backend.close()
        assert vectors.shape == expected.shape
        assert np.isfinite(vectors).all()
        assert MIN_COSINES[precision] <= cosines(vectors, expected).min() < 0.99999


@pytest.mark.slow
@pytest.mark.parametrize(("family", "precision"), [(FAMILY, "int8"), ("qwen3-left", "int4")])
def test_a_quantized_artifact_is_measured(family: str, precision: str, compiled: CompiledModels) -> None:
    """The exact graph is removed, and the description names the precision of the computation."""
    model = compiled(family, precision=precision)
    expected = reference(model.directory).encode(TEXTS, batch_size=5, show_progress_bar=False)
    assert cosines(embed_texts(model.load(), TEXTS), expected).min() >= MIN_COSINES[precision]
    assert (model.description.precision, model.description.compute) == (precision, "bf16" if native_bf16() else "fp32")
    fidelity = model.description.fidelity
    assert fidelity is not None
    assert MIN_COSINES[precision] <= fidelity.min_cosine < 0.99999
    assert sorted(path.name for path in model.artifact.directory.iterdir()) == sorted([*FILES, MANIFEST])
    assert compiled(family).description.compute is None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "min_cosine", "min_overlap", "max_size"), [("int8", 0.995, 0.97, 0.30), ("int4", 0.97, 0.92, 0.22)]
)
def test_the_bundled_model_reaches_the_documented_values(
    precision: str, min_cosine: float, min_overlap: float, max_size: float, compiled: CompiledModels
) -> None:
    """Lowest cosine, neighbors kept, and size on disk, in the fastest computation of this processor."""
    model = compiled("bundled", precision=precision)
    fidelity = model.description.fidelity
    assert fidelity is not None
    assert fidelity.min_cosine >= min_cosine
    assert fidelity.top10_overlap is not None
    assert fidelity.top10_overlap >= min_overlap
    assert weights_size(model) <= max_size * weights_size(compiled("bundled"))
    exact = "bf16" if native_bf16() else "fp32"
    assert model.description.compute == ("int8" if fast_int8() else exact)
    assert model.description.activation_group in (ACTIVATION_GROUPS if fast_int8() else (None,))
    assert model.steps[-5:] == ["verify", f"quantize to {precision}", "save", "measure", "write"]
    assert model.load().run(ONE_TOKEN).dense.shape == (1, 384)


@pytest.mark.slow
def test_a_model_that_nncf_cannot_quantize_is_unsupported(
    compiled: CompiledModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not served at fp32 instead. The reason contains the message of nncf."""

    def fail(*_: object, **__: object) -> Any:
        raise RuntimeError("no such operation")

    monkeypatch.setattr("nncf.compress_weights", fail)
    result, _ = compile_here(compiled.directory(FAMILY), tmp_path, precision="int4")
    assert result.outcome == "unsupported"
    assert "nncf cannot quantize it to int4: RuntimeError: no such operation" in result.reason
    assert not (tmp_path / "manifest.json").exists()


def test_a_graph_without_weights_is_not_changed() -> None:
    """There is nothing to quantize, which is not an error."""
    ops = openvino.opset13
    ids = ops.parameter([-1, -1], dtype=np.int64, name="input_ids")
    graph = openvino.Model([ops.convert(ids, "f32")], [ids], "plain")
    assert quantize(graph, "int4", description()) is graph


def test_calibration_inputs_have_the_default_prompt() -> None:
    """One batch per text. The pooling mask excludes the prompt."""
    plain = calibration_inputs(description())
    prompted = calibration_inputs(
        description(prompts={"query": "query: "}, default_prompt="query", excludes_prompt=True)
    )
    assert len(plain) == len(prompted) == len(calibration_texts())
    assert POOLING_MASK not in plain[0]
    assert plain[0]["input_ids"].shape < prompted[0]["input_ids"].shape
    assert prompted[0][POOLING_MASK][0, 0] == 0
    assert prompted[0][POOLING_MASK][0, -1] == 1


def test_calibration_inputs_of_a_reranker_are_pairs() -> None:
    """One for each text, with a short query that leaves room for it."""
    reranker = description(bert_pairs(), kind="reranker", arrays=(SCORES,), labels=("0",), has_token_types=True)
    inputs = calibration_inputs(reranker)
    assert len(inputs) == len(calibration_texts())
    assert all(each[TOKEN_TYPES][0, 0] == 0 and each[TOKEN_TYPES][0, -1] == 1 for each in inputs)
    assert max(each[INPUT_IDS].shape[1] for each in inputs) == reranker.max_length


def test_nncf_sends_no_telemetry_and_is_not_imported_for_serving() -> None:
    """Its telemetry is replaced by a stub."""
    code = (
        "import sys\n"
        "import emb_model_provider.artifacts.prepare, emb_model_provider.backends.openvino_cpu.backend\n"
        "assert 'nncf' not in sys.modules\n"
        "from emb_model_provider.backends.openvino_cpu.runtime import openvino\n"
        "openvino()\n"
        "from nncf.telemetry import telemetry\n"
        "print(type(telemetry).__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split()[-1] == "MagicMock"


def test_quantize_error_is_not_an_os_error() -> None:
    """Otherwise the compiler would report it as a full disk."""
    assert not issubclass(QuantizeError, OSError)
