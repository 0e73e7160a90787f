"""The fastest options of OpenVINO are measured, kept with the artifact by processor, and checked against the floors."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from emb_model_provider.artifacts import manifest, prepare
from emb_model_provider.artifacts.manifest import GRAPH, MANIFEST, read_artifact
from emb_model_provider.backends.base import Fidelity, Tuning
from emb_model_provider.backends.openvino_cpu import tuning as tuning_module
from emb_model_provider.backends.openvino_cpu.backend import OpenVinoBackend
from emb_model_provider.backends.openvino_cpu.tuning import Trial, measure_int8_gain, tune
from emb_model_provider.errors import LoadError
from emb_model_provider.fidelity.compare import MismatchError
from tests.artifacts.helpers import FAMILY, CompiledModels, Harness, compile_here
from tests.backends.helpers import TEXTS, cosines, embed_texts
from tests.models import snapshot_of, spec_of

if TYPE_CHECKING:
    from pathlib import Path

    from emb_model_provider.backends.openvino_cpu.tuning import Workload

OTHER = Tuning(fused_attention=False, fused_attention_alone=False, streams=1)


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Return how many times as fast an option is as its default; by `option=value`, or `option=value@INPUTSxTOKENS`."""
    factors: dict[str, float] = {}

    def measure(contender: tuning_module._Contender, workload: Workload) -> float:
        seconds = 1e-3 * workload[0] * workload[1]
        tuning = contender.backend.description.tuning
        for key, factor in factors.items():
            name, _, rest = key.partition("=")
            value, _, only = rest.partition("@")
            options = tuning if hasattr(tuning, name) else contender.backend.description
            if str(getattr(options, name)) == value and only in ("", f"{workload[0]}x{workload[1]}"):
                seconds /= factor
        return seconds

    monkeypatch.setattr(tuning_module._Contender, "measure", measure)
    return factors


def run_tune(compiled: CompiledModels, *, within_s: float = 1e6) -> tuple[Tuning, list[Trial]]:
    model = compiled(FAMILY)
    trials: list[Trial] = []
    found = tune(model.artifact.directory / GRAPH, model.description, within_s=within_s, cpus=2, on_trial=trials.append)
    return found, trials


def test_options_that_are_faster_are_combined(compiled: CompiledModels, speeds: dict[str, float]) -> None:
    """Each is compared with the best combination before it."""
    speeds |= {"fused_attention=False": 1.2, "streams=1": 1.06}
    found, trials = run_tune(compiled)
    assert found == Tuning(fused_attention=False, streams=1)
    assert [trial.gain for trial in trials] == pytest.approx([1.2, 1.0, 1.06])
    assert [trial.is_kept for trial in trials] == [True, False, True]


def test_noise_is_not_a_gain(compiled: CompiledModels, speeds: dict[str, float]) -> None:
    """Less than 10 % without the fused kernel, which takes more memory, less than 5 % otherwise, or a much slower workload."""
    longest = compiled(FAMILY).description.max_length
    speeds |= {
        "fused_attention=False": 1.09,
        "fused_attention_alone=False": 1.04,
        "streams=1": 2.0,
        f"streams=1@4x{min(256, longest)}": 0.4,
    }
    found, trials = run_tune(compiled)
    assert found == Tuning()
    assert not any(trial.is_kept for trial in trials)


@pytest.mark.parametrize("within_s", [0, 1e6])
def test_the_gain_of_quantized_activations(compiled: CompiledModels, speeds: dict[str, float], within_s: float) -> None:
    """Relative to floats with the same options, and however little time there is. Values below 1 are losses."""
    model = compiled(FAMILY)
    described = replace(model.description, compute="int8", tuning=OTHER)

    def measure() -> float | None:
        return measure_int8_gain(model.artifact.directory / GRAPH, described, within_s=within_s, cpus=2)

    assert measure() == pytest.approx(1.0)
    speeds["compute=int8"] = 1.6
    assert measure() == pytest.approx(1.6)
    speeds["compute=int8"] = 0.5
    assert measure() == pytest.approx(0.5)


def test_the_gain_is_not_measured_without_memory_for_a_second_model(
    compiled: CompiledModels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning_module, "free_memory", lambda: 1000)
    model = compiled(FAMILY)
    described = replace(model.description, compute="int8")
    assert measure_int8_gain(model.artifact.directory / GRAPH, described, within_s=1) is None


def test_options_without_time_keep_their_defaults(compiled: CompiledModels, speeds: dict[str, float]) -> None:
    speeds["fused_attention=False"] = 2.0
    assert run_tune(compiled, within_s=0) == (Tuning(), [])


def test_a_model_that_does_not_fit_twice_is_not_tuned(
    compiled: CompiledModels, speeds: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds["fused_attention=False"] = 2.0
    monkeypatch.setattr(tuning_module, "free_memory", lambda: 1000)
    assert run_tune(compiled) == (Tuning(), [])


@pytest.mark.slow
def test_measured_speeds_are_plausible(compiled: CompiledModels) -> None:
    """With real measurements, every option is tried, and no ratio is absurd."""
    _, trials = run_tune(compiled, within_s=600)
    assert {trial.tuning.fused_attention for trial in trials} >= {False}
    assert len(trials) == 3
    assert all(0.01 < ratio < 100 for trial in trials for ratio in trial.ratios.values())


def test_tuned_models_return_the_same_vectors(compiled: CompiledModels) -> None:
    """They differ by rounding only, with every option."""
    model = compiled(FAMILY)
    default = embed_texts(model.load(), TEXTS)
    tuned = OpenVinoBackend(model.artifact.directory / GRAPH, replace(model.description, tuning=OTHER), cpus=2)
    assert tuned.streams == 1
    vectors = embed_texts(tuned, TEXTS)
    np.testing.assert_allclose(cosines(vectors, default), 1.0, atol=1e-6)


# --- in the artifact ------------------------------------------------------------------------------------------


def test_options_of_this_processor_are_read(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of another processor, and options that this version does not know, are ignored."""
    harness.prepare()
    (directory,) = (path.parent for path in (harness.cache / "artifacts").glob(f"*/{MANIFEST}"))
    manifest.record_tuning(directory, OTHER)
    content = json.loads((directory / MANIFEST).read_text())
    for values in content["tunings"].values():
        values["invented"] = 1
    (directory / MANIFEST).write_text(json.dumps(content))
    assert harness.describe().tuning == OTHER
    monkeypatch.setattr(manifest, "processor", lambda: "another processor")
    artifact = read_artifact(directory)
    assert artifact is not None
    assert artifact.description.tuning == Tuning()


@pytest.mark.slow
def test_compiling_chooses_and_keeps_the_options(
    compiled: CompiledModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The vectors with these options are compared with the reference."""
    monkeypatch.setattr("emb_model_provider.compiler.build.tune", lambda *_, **__: OTHER)
    compared: list[Tuning] = []

    def measure(backend: OpenVinoBackend, *_: object, **__: object) -> Fidelity:
        compared.append(backend.description.tuning)
        return Fidelity(min_cosine=1.0, mean_cosine=1.0, texts=1)

    result, steps = compile_here(compiled.directory(FAMILY), tmp_path, measure=measure, precision="fp32", tune_s=1.0)
    assert result.outcome == "done"
    assert steps[-3:] == ["tune", "verify", "write"]
    assert compared == [OTHER]
    artifact = read_artifact(tmp_path)
    assert artifact is not None
    assert artifact.description.tuning == OTHER


@pytest.mark.slow
def test_options_that_cost_too_much_accuracy_are_not_used(
    compiled: CompiledModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("emb_model_provider.compiler.build.tune", lambda *_, **__: OTHER)

    def measure(backend: OpenVinoBackend, *_: object, **__: object) -> Fidelity:
        if backend.description.tuning == OTHER:
            raise MismatchError("cosine 0.9")
        return Fidelity(min_cosine=1.0, mean_cosine=1.0, texts=1)

    result, _ = compile_here(compiled.directory(FAMILY), tmp_path, measure=measure, precision="fp32", tune_s=1.0)
    assert result.outcome == "done"
    artifact = read_artifact(tmp_path)
    assert artifact is not None
    assert artifact.description.tuning == Tuning()


# --- again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("min_cosine", "expected"), [(1.0, OTHER), (0.9995, OTHER), (0.997, Tuning())])
def test_tuning_again_is_checked_against_the_floor(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, min_cosine: float, expected: Tuning
) -> None:
    """The vectors are compared with those that were compared with the reference."""
    monkeypatch.setattr(tuning_module, "tune", lambda *_, **__: OTHER)
    fidelity = Fidelity(min_cosine=min_cosine, mean_cosine=1.0, texts=1)
    monkeypatch.setattr(prepare, "compare", lambda *_, **__: fidelity)
    found = harness.preparer().tune(spec_of(), snapshot_of(harness.directory), within_s=1)
    assert found == harness.describe().tuning == expected


@pytest.mark.parametrize(("compute", "expected"), [("int8", 1.25), ("fp32", None)])
def test_tuning_again_measures_the_gain_of_quantized_activations(
    harness: Harness, monkeypatch: pytest.MonkeyPatch, compute: str, expected: float | None
) -> None:
    """It is kept with the options of this processor, and only such a model has one."""
    harness.prepare()
    (manifest_path,) = (harness.cache / "artifacts").glob(f"*/{MANIFEST}")
    content = json.loads(manifest_path.read_text())
    content["description"] |= {"compute": compute, "activation_group": 64}
    manifest_path.write_text(json.dumps(content))
    monkeypatch.setattr(tuning_module, "tune", lambda *_, **__: Tuning(streams=1))
    monkeypatch.setattr(tuning_module, "measure_int8_gain", lambda *_, **__: 1.25)
    fidelity = Fidelity(min_cosine=1.0, mean_cosine=1.0, texts=1)
    monkeypatch.setattr(prepare, "compare", lambda *_, **__: fidelity)
    found = harness.preparer().tune(spec_of(), snapshot_of(harness.directory), within_s=1)
    assert found == Tuning(streams=1, int8_gain=expected)
    artifact = read_artifact(manifest_path.parent)
    assert artifact is not None
    assert (artifact.description.tuning, artifact.description.activation_group) == (found, 64)


def test_a_model_of_torch_cannot_be_tuned(harness: Harness) -> None:
    with pytest.raises(LoadError, match="nothing to tune"):
        harness.preparer().tune(spec_of(backend="torch"), snapshot_of(harness.directory), within_s=1)
