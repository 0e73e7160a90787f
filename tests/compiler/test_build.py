"""An artifact is written only if its vectors are those of the model."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest
from transformers import BertConfig, BertModel

from emb_model_provider.artifacts.manifest import read_artifact
from emb_model_provider.backends.base import Fidelity, Tuning
from emb_model_provider.backends.hardware import native_bf16
from emb_model_provider.compiler.export import EXPORTERS, trace
from emb_model_provider.fidelity.compare import MIN_COSINE, MismatchError, compare
from tests.artifacts.helpers import FAMILY, CompiledModels, compile_here
from tests.backends.pytorch.test_padding import fnet
from tests.backends.small_tokenizers import wordpiece
from tests.models import save_st

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from emb_model_provider.backends.base import Backend
    from emb_model_provider.backends.openvino_cpu.backend import OpenVinoBackend
    from emb_model_provider.fidelity.compare import Case


def failing_export(*_: object) -> Any:
    raise RuntimeError("cannot be exported")


def wrong_export(served: Any, on_step: Callable[[str], None]) -> Any:
    """Trace a copy of a pipeline with other embeddings."""
    other = copy.deepcopy(served)
    other.pipeline.transformers_model.get_input_embeddings().weight.data.mul_(-0.5)
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
    """The reference vectors are not computed, because they take longer than failing."""
    exporters = {"first": failing_export, "second": failing_export}
    result, steps = compile_here(compiled.directory(FAMILY), tmp_path, exporters=exporters, precision="fp32")
    assert result.outcome == "unsupported"
    assert steps == ["load"]
    assert result.reason == ("first: RuntimeError: cannot be exported; second: RuntimeError: cannot be exported")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tracing", "tracing, attention not fused"])
@pytest.mark.parametrize("family", ["bert-prompts-excluded", "modernbert", "qwen3-left"])
def test_each_exporter_makes_the_same_model(name: str, family: str, compiled: CompiledModels, tmp_path: Path) -> None:
    """The other tests use torch.export."""
    result, _ = compile_here(compiled.directory(family), tmp_path, exporters={name: EXPORTERS[name]}, precision="fp32")
    assert result.outcome == "done"


class Measurement:
    """Measures like `compare`, but lets every precision except fp32 have another lowest cosine."""

    def __init__(self, min_cosine: float | None) -> None:
        self.min_cosine = min_cosine
        """None if vectors are not finite."""

    def __call__(self, backend: Backend, cases: Sequence[Case], *, exact: bool) -> Fidelity:
        if backend.description.precision == "fp32":
            return compare(backend, cases, exact=exact)
        if self.min_cosine is None:
            raise MismatchError("1 of 2 vectors are not finite")
        if exact and self.min_cosine < MIN_COSINE:
            raise MismatchError(f"cosine {self.min_cosine}")
        return Fidelity(min_cosine=self.min_cosine, mean_cosine=self.min_cosine, texts=1)


@pytest.mark.slow
def test_auto_falls_back_to_fp32(compiled: CompiledModels, tmp_path: Path) -> None:
    """A note says how far bf16 is off."""
    result, _ = compile_here(
        compiled.directory(FAMILY), tmp_path, measure=Measurement(0.5), bf16=True, precision="auto"
    )
    assert result.outcome == "done"
    description = manifest(tmp_path)["description"]
    assert description["precision"] == "fp32"
    assert description["notes"] == ["computed in fp32, because it is not accurate enough at bf16, cosine 0.5"]


@pytest.mark.slow
def test_a_requested_bf16_is_only_measured(compiled: CompiledModels, tmp_path: Path) -> None:
    """Its floor is a setting of the service, so that the artifact has the cosine and no note."""
    result, _ = compile_here(
        compiled.directory(FAMILY), tmp_path, measure=Measurement(0.9987), bf16=True, precision="bf16"
    )
    assert result.outcome == "done", result
    description = manifest(tmp_path)["description"]
    assert (description["precision"], description["notes"]) == ("bf16", [])
    assert description["fidelity"]["min_cosine"] == 0.9987


@pytest.mark.slow
def test_a_requested_bf16_that_is_not_finite_is_computed_in_fp32(compiled: CompiledModels, tmp_path: Path) -> None:
    result, _ = compile_here(
        compiled.directory(FAMILY), tmp_path, measure=Measurement(None), bf16=True, precision="bf16"
    )
    assert result.outcome == "done", result
    description = manifest(tmp_path)["description"]
    assert description["precision"] == "fp32"
    assert description["notes"] == [
        "computed in fp32, because it is not accurate enough at bf16, 1 of 2 vectors are not finite"
    ]


@pytest.mark.slow
def test_a_wrong_conversion_is_not_taken_for_the_inaccuracy_of_bf16(compiled: CompiledModels, tmp_path: Path) -> None:
    """The graph must be exact at fp32."""
    exporters = {"wrong": wrong_export}
    result, _ = compile_here(compiled.directory(FAMILY), tmp_path, exporters=exporters, bf16=True, precision="bf16")
    assert result.outcome == "refused"
    assert "at fp32, cosine" in result.reason


@pytest.mark.parametrize("rows", [20, pytest.param(239, marks=pytest.mark.slow)])
def test_a_reference_that_cannot_embed_is_a_reason(rows: int, tmp_path: Path) -> None:
    """Here the tokenizer has ids that the model does not have: those of most words, or one that is only in a prompt."""
    tokenizer = wordpiece()
    tokenizer.add_tokens(["[EXTRA]"])
    config = BertConfig(
        vocab_size=rows, hidden_size=48, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64
    )
    prompts = {"prompts": {"query": "[EXTRA] "}}
    directory = save_st(tmp_path / "model", lambda _: BertModel(config), tokenizer, st=prompts)
    result, _ = compile_here(directory, tmp_path / "artifact")
    assert result.outcome == "unsupported"
    assert result.reason.startswith("the reference cannot compute the comparison texts: IndexError: ")


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_lack_of_memory_is_not_a_property_of_the_model(
    error: Exception, compiled: CompiledModels, tmp_path: Path
) -> None:
    """It is raised, so that it is not recorded as a refusal, and no other exporter is tried."""

    def exhausted(*_: object) -> Any:
        raise error

    with pytest.raises(type(error)):
        compile_here(compiled.directory(FAMILY), tmp_path, exporters={"first": exhausted, "second": failing_export})


@pytest.mark.slow
def test_the_next_exporter_is_tried_if_a_graph_cannot_be_run(compiled: CompiledModels, tmp_path: Path) -> None:
    """Not only if it cannot be exported."""
    calls = []

    def measure(backend: Backend, cases: Sequence[Case], *, exact: bool) -> Fidelity:
        calls.append(backend)
        if len(calls) == 1:
            raise RuntimeError("unknown operation")
        return compare(backend, cases, exact=exact)

    result, _ = compile_here(
        compiled.directory(FAMILY), tmp_path, exporters={"first": trace, "second": trace}, measure=measure, bf16=False
    )
    assert result.outcome == "done", result
    assert manifest(tmp_path)["made_by"] == "second"


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kept", "gain", "expected"),
    [
        ({64: 0.97, 32: 0.98}, 1.6, ("int8", 64, 1.6)),
        ({64: 0.9699, 32: 0.97}, 1.2, ("int8", 32, 1.2)),
        ({64: 0.97, 32: 0.98}, None, ("int8", 64, None)),
        ({64: 0.9699, 32: 0.9699}, 1.6, ("fp32", None, None)),
        ({64: 0.97, 32: 0.98}, 0.99, ("fp32", None, None)),
    ],
)
def test_activations_share_scales_as_far_as_the_accuracy_allows(
    compiled: CompiledModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kept: dict[int, float],
    gain: float | None,
    expected: tuple[str, int | None, float | None],
) -> None:
    """Floats are used if no group is accurate enough, or if they are faster here."""

    def measure(backend: OpenVinoBackend, *_: object, **__: object) -> Fidelity:
        group = backend.description.activation_group
        overlap = kept[group] if group is not None else 0.99
        return Fidelity(min_cosine=0.999, mean_cosine=1.0, texts=1, top10_overlap=overlap)

    monkeypatch.setattr("emb_model_provider.compiler.build.tune", lambda *_, **__: Tuning(streams=1))
    monkeypatch.setattr("emb_model_provider.compiler.build.measure_int8_gain", lambda *_, **__: gain)
    result, _ = compile_here(
        compiled.directory(FAMILY), tmp_path, bf16=False, int8=True, precision="int8", measure=measure, tune_s=1.0
    )
    assert result.outcome == "done"
    artifact = read_artifact(tmp_path)
    assert artifact is not None
    description = artifact.description
    assert (description.compute, description.activation_group, description.tuning.int8_gain) == expected
    assert description.fidelity is not None
    assert description.fidelity.top10_overlap == (kept[expected[1]] if expected[1] is not None else 0.99)
    slower = [note for note in description.notes if "slower here (0.99 times as fast)" in note]
    inaccurate = [note for note in description.notes if "0.9699 of neighbors kept" in note]
    assert (len(slower), len(inaccurate)) == (int(gain == 0.99), int(expected[0] == "fp32" and gain != 0.99))


def test_a_model_whose_vectors_depend_on_padding_is_not_compiled(tmp_path: Path) -> None:
    """A compiled model pads its inputs. It is not exported first, which takes long."""
    result, steps = compile_here(save_st(tmp_path / "fnet", fnet, wordpiece()), tmp_path / "artifact")
    assert (result.outcome, steps) == ("unsupported", ["load"])
    assert "padding" in result.reason
