"""An artifact is written only if its vectors are those of the model."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.backends.hardware import native_bf16
from emb_model_provider.compiler import build
from emb_model_provider.compiler.export import EXPORTERS, trace
from emb_model_provider.fidelity.compare import MismatchError
from tests.artifacts.helpers import FAMILY, CompiledModels, compile_here

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def failing_export(*_: object) -> Any:
    raise RuntimeError("cannot be exported")


def wrong_export(pipeline: Any, on_step: Callable[[str], None]) -> Any:
    """Trace a copy of a pipeline with other embeddings."""
    other = copy.deepcopy(pipeline)
    other.transformers_model.get_input_embeddings().weight.data.mul_(-0.5)
    return trace(other, on_step)


def manifest(artifact: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((artifact / "manifest.json").read_text())
    return content


@pytest.mark.slow
def test_exporters_are_tried_in_order(compiled: CompiledModels, tmp_path: Path) -> None:
    """The first one fails, the second one makes other vectors, and the third one is named in the manifest."""
    exporters = {"first": failing_export, "second": wrong_export, "third": trace}
    result, _ = compile_here(compiled.directory(FAMILY), tmp_path, exporters=exporters, precision="fp32")
    assert result.outcome == "done"
    assert manifest(tmp_path)["made_by"] == "third"


def test_a_model_is_refused_if_all_exporters_make_other_vectors(compiled: CompiledModels, tmp_path: Path) -> None:
    """The reason names exporter and cosine, and there is no manifest."""
    result, _ = compile_here(compiled.directory(FAMILY), tmp_path, exporters={"wrong": wrong_export}, precision="fp32")
    assert result.outcome == "refused"
    assert "wrong: at fp32, cosine" in result.reason
    assert "less than 0.999" in result.reason
    assert not (tmp_path / "manifest.json").exists()


def test_a_model_is_unsupported_if_all_exporters_fail(compiled: CompiledModels, tmp_path: Path) -> None:
    exporters = {"first": failing_export, "second": failing_export}
    result, _ = compile_here(compiled.directory(FAMILY), tmp_path, exporters=exporters, precision="fp32")
    assert result.outcome == "unsupported"
    assert result.reason == ("first: RuntimeError: cannot be exported; second: RuntimeError: cannot be exported")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tracing", "tracing, attention not fused"])
@pytest.mark.parametrize("family", ["bert-prompts-excluded", "modernbert", "qwen3-left"])
def test_each_exporter_makes_the_same_model(name: str, family: str, compiled: CompiledModels, tmp_path: Path) -> None:
    """The other tests use torch.export."""
    result, _ = compile_here(compiled.directory(family), tmp_path, exporters={name: EXPORTERS[name]}, precision="fp32")
    assert result.outcome == "done"


@pytest.mark.slow
def test_auto_falls_back_to_fp32(compiled: CompiledModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A note says how far bf16 is off."""
    real = build.compare

    def compare(backend: Any, cases: Any, **options: Any) -> Any:
        if backend.description.precision != "fp32":
            raise MismatchError("cosine 0.5")
        return real(backend, cases, **options)

    monkeypatch.setattr(build, "compare", compare)
    result, _ = compile_here(compiled.directory(FAMILY), tmp_path, bf16=True, precision="auto")
    assert result.outcome == "done"
    description = manifest(tmp_path)["description"]
    assert description["precision"] == "fp32"
    assert description["notes"] == ["computed in fp32, because it is not accurate enough at bf16, cosine 0.5"]


@pytest.mark.slow
def test_a_wrong_conversion_is_refused_before_it_is_quantized(compiled: CompiledModels, tmp_path: Path) -> None:
    """Otherwise its error would be taken for the loss of accuracy by quantization."""
    result, steps = compile_here(
        compiled.directory(FAMILY), tmp_path, exporters={"wrong": wrong_export}, precision="int8"
    )
    assert result.outcome == "refused"
    assert "quantize to int8" not in steps


@pytest.mark.slow
def test_activations_are_quantized_only_if_that_is_accurate_enough(compiled: CompiledModels, tmp_path: Path) -> None:
    """Small models with random weights are not. They compute in bf16 or fp32, and a note says why."""
    result, _ = compile_here(compiled.directory(FAMILY), tmp_path, int8=True, precision="int8")
    assert result.outcome == "done"
    description = manifest(tmp_path)["description"]
    assert description["compute"] == ("bf16" if native_bf16() else "fp32")
    assert any("not accurate enough with activations in 8 bits" in note for note in description["notes"])
