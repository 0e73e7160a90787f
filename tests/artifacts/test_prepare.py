"""The backend of a model is chosen, compiled once, and checked against the floor of its precision."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.artifacts import prepare
from emb_model_provider.artifacts import recipe as recipes
from emb_model_provider.artifacts.prepare import CompileLimits
from emb_model_provider.backends.hardware import native_bf16
from emb_model_provider.errors import LoadError, OperationCancelledError
from emb_model_provider.fidelity.compare import SETTING, AccuracyError
from emb_model_provider.formatting import format_cosine
from emb_model_provider.progress import CancelToken
from emb_model_provider.settings import FIDELITY_FLOORS
from tests.artifacts.helpers import FAMILY, ONE_TOKEN, CompiledModels, Harness, wait_for
from tests.marks import mark_slow_except
from tests.models import save_static, snapshot_of, spec_of

if TYPE_CHECKING:
    from emb_model_provider.artifacts.prepare import PreparedBackend


# --- compiling once ---------------------------------------------------------------------------------------------


def test_an_artifact_is_used_again(harness: Harness) -> None:
    """The second start neither starts the compiler nor reports progress."""
    for _ in range(2):
        assert harness.describe().backend == "openvino"
        assert [progress.step for progress in harness.progress] == ["", "pretend"]
    assert harness.starts == 1


def test_compilations_are_recorded(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time that the compiler runs, with its outcome; an artifact that exists is no compilation."""
    for _ in range(2):
        harness.prepare()
    assert [(record.kind, record.outcome, record.duration_s > 0) for record in harness.work] == [
        ("compile", "ok", True)
    ]
    options = json.loads(os.environ["FAKE_COMPILER"]) | {"outcome": "refused"}
    monkeypatch.setenv("FAKE_COMPILER", json.dumps(options))
    harness.prepare(precision="int8")
    assert [record.outcome for record in harness.work] == ["ok", "failed"]


def test_a_model_is_compiled_again_if_its_snapshot_changes(harness: Harness, tmp_path: Path) -> None:
    """A further file makes another artifact."""
    harness.prepare()
    harness.directory = Path(shutil.copytree(harness.directory, tmp_path / "changed"))
    (harness.directory / "changed.txt").write_text("x")
    harness.prepare()
    assert harness.starts == 2
    assert len(harness.artifacts) == 2


def test_torch_serves_only_what_is_compiled_later(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """At precisions whose vectors torch has, too, and if there is memory for both."""
    assert harness.is_compiled_later(precision="auto")
    for changes in ({"precision": "int8"}, {"precision": "int4"}, {"backend": "torch"}, {"backend": "openvino"}):
        assert not harness.is_compiled_later(**changes)
    with monkeypatch.context() as patched:
        patched.setattr("emb_model_provider.artifacts.torch_fidelity.free_memory", lambda: 10**9)
        assert not harness.is_compiled_later()
    with monkeypatch.context() as patched:
        patched.setattr(prepare, "installed_version", lambda _: None)
        assert not harness.is_compiled_later()
    harness.prepare()
    assert not harness.is_compiled_later()
    assert harness.is_compiled_later(pooling="cls")
    harness.configure_compiler(outcome="refused")
    assert harness.prepare(pooling="cls").backend == "torch"
    assert not harness.is_compiled_later(pooling="cls")


@pytest.mark.parametrize("package", ["openvino", "torch", "transformers", "sentence-transformers", "tokenizers"])
def test_a_model_is_compiled_again_if_a_library_changes(
    package: str, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upgraded library may compute differently, so the artifact must be compared again."""
    harness.prepare()
    real = recipes.installed_version
    monkeypatch.setattr(recipes, "installed_version", lambda name: "99" if name == package else real(name))
    harness.prepare()
    assert harness.starts == 2


def test_a_model_is_compiled_again_if_the_settings_change_its_pipeline(harness: Harness) -> None:
    """pooling, normalize, max_length and precision change the artifact; alias, name and dimensions do not."""
    harness.prepare(precision="fp32")
    harness.prepare(precision="fp32", alias="other", name="other/model", dimensions=(8,))
    assert harness.starts == 1
    for changed in ({"pooling": "cls"}, {"normalize": False}, {"max_length": 20}, {"precision": "fp16"}):
        harness.prepare(**{"precision": "fp32", **changed})
    assert harness.starts == 5


def test_configured_prompts_are_applied_without_compiling(harness: Harness) -> None:
    """Prompts are put before the text, and are not part of the graph."""
    harness.prepare()
    assert harness.describe(prompts={"query": "q: "}).prompts["query"] == "q: "
    assert harness.starts == 1


def test_two_preparers_compile_once(harness: Harness, caplog: pytest.LogCaptureFixture) -> None:
    """The second one logs that it waits for the first one, and uses the artifact of that."""
    harness.configure_compiler(wait_for=str(harness.root / "go"))
    prepared: list[PreparedBackend] = []
    threads = [threading.Thread(target=lambda: prepared.append(harness.prepare())) for _ in range(2)]
    with caplog.at_level(logging.INFO):
        for thread in threads:
            thread.start()
        wait_for(lambda: "waiting for it" in caplog.text)
        (harness.root / "go").touch()
        for thread in threads:
            thread.join(60)
    assert [each.backend for each in prepared] == ["openvino", "openvino"]
    assert harness.starts == 1


@pytest.mark.slow
def test_a_quantized_artifact_is_used_again(
    compiled: CompiledModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version of nncf makes another artifact."""
    harness = Harness(compiled(FAMILY, precision="int8"), tmp_path, monkeypatch)
    for _ in range(2):
        description = harness.describe(precision="int8")
        assert description.precision == "int8"
        assert any("weights are stored in 8 bits" in note for note in description.notes)
    assert harness.starts == 1
    real = recipes.installed_version
    monkeypatch.setattr(recipes, "installed_version", lambda name: "99" if name == "nncf" else real(name))
    harness.prepare(precision="int8")
    assert harness.starts == 2


# --- failures ---------------------------------------------------------------------------------------------------


def test_torch_does_not_serve_if_the_compiler_is_killed(harness: Harness) -> None:
    """SIGKILL means that memory ran out, and in this process torch would need as much. A later attempt may succeed."""
    harness.configure_compiler(die=int(signal.SIGKILL))
    with pytest.raises(LoadError, match=r"SIGKILL \(most often: not enough memory\).*not loaded by torch.*Free memory"):
        harness.prepare()
    harness.configure_compiler(outcome="no memory")
    with pytest.raises(LoadError, match=r"as the test requests.*not loaded by torch.*Free memory"):
        harness.prepare()
    assert harness.artifacts == []
    harness.configure_compiler()
    assert harness.prepare().backend == "openvino"
    assert harness.starts == 3


def test_torch_serves_if_the_compiler_crashes(harness: Harness) -> None:
    """A note has the signal and the last line that the compiler printed. It is tried again at the next start."""
    harness.configure_compiler(die=int(signal.SIGABRT), last_words="terminate called: No space left")
    prepared = harness.prepare()
    assert "killed by SIGABRT: terminate called: No space left" in prepared.notes[0]
    backend = prepared.load()
    assert backend.description.backend == "torch"
    assert prepared.notes[0] in backend.description.notes
    harness.configure_compiler()
    assert harness.prepare().notes == ()


@pytest.mark.parametrize("declared", [{"hidden_size": 2_000_000}, {"num_hidden_layers": 10**9}, {"vocab_size": 10**12}])
def test_declared_sizes_are_compared_with_the_free_memory(
    declared: dict[str, int], harness: Harness, tmp_path: Path
) -> None:
    """Whatever the size of the files with the weights: nothing is compiled, and torch loads nothing."""
    harness.directory = Path(shutil.copytree(harness.directory, tmp_path / "declared"))
    config = json.loads((harness.directory / "config.json").read_text())
    (harness.directory / "config.json").write_text(json.dumps({**config, **declared}))
    with pytest.raises(
        LoadError, match=r"needs at least .* of memory by its config\.json, and .* are free\. Free memory"
    ):
        harness.prepare().load()
    with pytest.raises(LoadError, match=r"backend openvino: compiling it needs too much memory"):
        harness.prepare(backend="openvino")
    assert harness.starts == 0


def test_a_refusal_is_recorded(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch serves with the reason in a note; it is tried again only if the recipe changes."""
    harness.configure_compiler(outcome="refused")
    for _ in range(2):
        assert "as the test requests" in harness.prepare().notes[0]
    assert (harness.starts, harness.artifacts) == (1, [])
    with pytest.raises(
        LoadError, match=r"the backend openvino: as the test requests.*`--backend`, or EMB_PROVIDER_BACKEND"
    ):
        harness.prepare(backend="openvino")
    harness.configure_compiler()
    monkeypatch.setattr(recipes, "FORMAT", 999)
    assert harness.prepare().notes == ()


def test_a_refusal_of_another_version_of_the_package_is_void(harness: Harness) -> None:
    """An upgrade may compile models that its predecessor could not."""
    harness.configure_compiler(outcome="unsupported")
    harness.prepare()
    (record,) = (harness.cache / "artifacts").glob("*.refused.json")
    record.write_text(json.dumps({**json.loads(record.read_text()), "package": "0.0.1"}))
    harness.configure_compiler()
    assert harness.prepare().notes == ()
    assert harness.starts == 2


def test_torch_serves_if_compiling_takes_too_long(harness: Harness) -> None:
    """The compiler process is killed, and a note names the setting. The same limit is not tried again, a higher one is."""
    harness.configure_compiler(wait_for=str(harness.root / "never"))
    harness.compile_timeout_s = 2
    for _ in range(2):
        (note,) = harness.prepare().notes
        assert "compiling took longer than 2 s (last step: 'pretend')" in note
        assert "increase EMB_PROVIDER_COMPILE_TIMEOUT_S (0: no limit)" in note
    with pytest.raises(ProcessLookupError):
        os.kill(int(harness.starts_file.read_text()), 0)
    with pytest.raises(LoadError, match=r"backend openvino: compiling took longer.*COMPILE_TIMEOUT_S"):
        harness.prepare(backend="openvino")
    harness.configure_compiler()
    harness.compile_timeout_s = 60
    assert harness.prepare().notes == ()
    assert harness.starts == 2


def test_without_a_limit_a_timed_out_model_is_compiled_again(harness: Harness) -> None:
    harness.configure_compiler(wait_for=str(harness.root / "never"))
    harness.compile_timeout_s = 0.1
    assert harness.prepare().notes
    harness.configure_compiler()
    harness.compile_timeout_s = 0
    assert harness.prepare().notes == ()


def test_a_compiler_without_progress_is_killed(harness: Harness) -> None:
    """Without a limit of the whole time, too. torch serves, unless loading hangs, which it would here, too."""
    harness.limits = CompileLimits(step_s=1)
    harness.configure_compiler(wait_for=str(harness.root / "never"))
    assert "no progress for 1" in harness.prepare().notes[0]
    harness.configure_compiler(wait_for=str(harness.root / "never"), step="load")
    with pytest.raises(LoadError, match=r"cannot be loaded: compiling made no progress for 1.*Choose another model"):
        harness.prepare(max_length=9)


def test_no_model_waits_forever_for_another_one_to_be_compiled(harness: Harness) -> None:
    """Neither for another one of this process, nor for another process that compiles the same one."""
    harness.limits = CompileLimits(wait_s=0.5)
    harness.configure_compiler(wait_for=str(harness.root / "go"))
    preparer = harness.preparer()
    cancel = CancelToken()
    thread = threading.Thread(target=lambda: preparer.prepare(spec_of(), snapshot_of(harness.directory), cancel=cancel))
    thread.start()
    wait_for(lambda: harness.starts)
    other = preparer.prepare(spec_of(max_length=9), snapshot_of(harness.directory))
    assert "another model is being compiled, without progress" in other.notes[0]
    assert "another process has held" in harness.prepare().notes[0]
    (harness.root / "go").touch()
    thread.join(60)
    assert harness.prepare().notes == ()
    assert harness.starts == 1


def test_a_snapshot_that_cannot_be_loaded_is_an_error(harness: Harness) -> None:
    """torch is not tried, because it would fail, too."""
    harness.configure_compiler(outcome="broken")
    with pytest.raises(LoadError, match="as the test requests"):
        harness.prepare()


def test_compiling_can_be_cancelled(harness: Harness) -> None:
    """The compiler process has ended when `prepare` returns."""
    harness.configure_compiler(wait_for=str(harness.root / "never"))
    with pytest.raises(OperationCancelledError):
        harness.prepare(cancel=CancelToken(lambda: harness.starts > 0))
    process = int(harness.starts_file.read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
    assert harness.artifacts == []


# --- choosing the backend ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("requested", "device", "cuda", "expected"),
    [
        ("auto", "auto", False, "openvino"),
        ("auto", "cpu", True, "openvino"),
        ("openvino", "auto", True, "openvino"),
        ("torch", "cpu", False, "torch"),
    ],
)
def test_the_backend_depends_on_the_device(
    requested: str, device: str, cuda: bool, expected: str, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """auto is openvino on a CPU; a requested backend is used."""
    monkeypatch.setattr(prepare, "has_cuda", lambda: cuda)
    assert harness.describe(backend=requested, device=device).backend == expected


@pytest.mark.parametrize("device", ["auto", "cuda"])
def test_auto_is_torch_with_a_cuda_device(device: str, harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compiled for a device that torch serves."""
    monkeypatch.setattr(prepare, "has_cuda", lambda: True)
    assert harness.prepare(device=device).backend == "torch"
    assert harness.starts == 0


def test_a_note_says_why_a_gpu_is_not_used(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the device is chosen automatically. Otherwise a driver that is too old would only make the service slow."""
    monkeypatch.setattr(prepare, "has_cuda", lambda: False)
    monkeypatch.setattr(prepare, "cuda_problem", lambda: "the NVIDIA driver is too old")
    note = "served on the CPU, because the NVIDIA driver is too old"
    assert note in harness.describe(device="auto").notes
    assert note not in harness.describe(device="cpu").notes
    assert note not in harness.describe(device="auto", backend="openvino").notes


def test_openvino_on_a_gpu_is_an_error(harness: Harness) -> None:
    """The message names both values, and the flag and the setting of each."""
    with pytest.raises(
        LoadError, match=r"backend openvino.*device cuda:0.*`--device`, or EMB_PROVIDER_DEVICE.*`--backend`, or"
    ):
        harness.prepare(backend="openvino", device="cuda:0")


@pytest.mark.parametrize(
    ("precision", "expected"),
    [("fp16", "weights are stored at half precision"), ("bf16", "does not support bf16 natively")],
)
def test_a_note_explains_another_precision(
    precision: str, expected: str, harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The description names the precision of the computation, and a note says why it is another one."""
    monkeypatch.setattr(prepare, "native_bf16", lambda: False)
    description = harness.describe(precision=precision)
    assert description.precision == "fp32"
    assert any(expected in note for note in description.notes)


def test_an_artifact_of_another_machine_is_used_if_it_cannot_be_compiled_here(
    harness: Harness, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an image without the tools, made on a processor without bf16."""
    monkeypatch.setattr(prepare, "native_bf16", lambda: False)
    harness.prepare()
    tools = recipes.TOOL_PACKAGES
    real = recipes.installed_version
    for module in (recipes, prepare):
        monkeypatch.setattr(module, "installed_version", lambda name: None if name in tools else real(name))
    monkeypatch.setattr(prepare, "native_bf16", lambda: True)
    assert harness.describe().precision == "fp32"
    with pytest.raises(LoadError, match="compiling needs torch"):
        harness.prepare(max_length=9, backend="openvino")
    assert harness.starts == 1


# --- accuracy of compiled models --------------------------------------------------------------------------------


@pytest.fixture
def int8(compiled: CompiledModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Harness:
    """Return a harness whose model is compiled at int8."""
    return Harness(compiled(FAMILY, precision="int8"), tmp_path, monkeypatch)


def test_a_compiled_model_below_its_floor_is_refused_until_the_floor_is_lowered(int8: Harness) -> None:
    """The message says what to change; the model is not compiled again."""
    fidelity = int8.compiled.description.fidelity
    assert fidelity is not None
    assert fidelity.min_cosine < 1
    with pytest.raises(AccuracyError) as caught:
        int8.prepare(floors={"int8": 1.0}, precision="int8")
    message = caught.value.message
    assert "\n" not in message
    assert message.startswith("test/small is not accurate enough at int8")
    assert f"{format_cosine(fidelity.min_cosine)} over {fidelity.texts} texts" in message
    assert f"the floor of int8 in {SETTING} is 1" in message
    assert "to bf16, fp16 or fp32, or lower that floor" in message
    description = int8.describe(floors={"int8": fidelity.min_cosine - 0.001}, precision="int8")
    assert (description.backend, description.precision) == ("openvino", "int8")
    assert description.fidelity == fidelity
    assert int8.starts == 1


def test_the_floor_is_that_of_the_requested_precision(int8: Harness) -> None:
    """The floor of the precision that int8 is computed in does not apply."""
    others = dict.fromkeys(set(FIDELITY_FLOORS) - {"int8"}, 1.0)
    assert int8.describe(floors={**others, "int8": 0.0}, precision="int8").precision == "int8"


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_fp32_below_its_floor_is_refused(precision: str, harness: Harness) -> None:
    """The only advice is to lower the floor, because no precision is more accurate."""
    with pytest.raises(AccuracyError, match=r"not accurate enough at fp32.*Lower that floor\.$"):
        harness.prepare(floors={"fp32": 1.0}, precision=precision)


def test_measure_fidelity_does_not_concern_compiled_models(harness: Harness) -> None:
    """They are compared when they are compiled, so their floor applies."""
    with pytest.raises(AccuracyError):
        harness.prepare(floors={"fp32": 1.0}, measure=False, precision="fp32")
    fidelity = harness.describe(measure=False, precision="fp32").fidelity
    assert fidelity is not None
    assert fidelity.min_cosine >= 0.999


@pytest.mark.skipif(not native_bf16(), reason="auto is fp32 on a processor without native bf16")
@pytest.mark.parametrize(("floor", "min_cosine", "applied"), [(1.0, 0.9995, "1"), (0.0, 0.9985, "0.999")])
def test_auto_falls_back_to_fp32(floor: float, min_cosine: float, applied: str, harness: Harness) -> None:
    """The configured floor applies, or that of auto if it is higher. A note names cosine and floor."""
    harness.describe(precision="fp32")
    assert harness.starts == 1
    _compile_to_bf16(harness, min_cosine)
    for _ in range(2):
        description = harness.describe(floors={"bf16": floor}, precision="auto")
        assert (description.precision, description.backend) == ("fp32", "openvino")
        note = f"computed in fp32: its lowest cosine to fp32 at bf16 is {min_cosine:.5f}, below {applied}"
        assert note in description.notes
        assert harness.starts == 2


@pytest.mark.skipif(not native_bf16(), reason="auto is fp32 on a processor without native bf16")
def test_auto_is_bf16_if_it_is_accurate_enough(harness: Harness) -> None:
    """There is no note, and nothing is compiled at fp32."""
    _compile_to_bf16(harness, 0.9995)
    description = harness.describe(precision="auto")
    assert (description.precision, description.notes) == ("bf16", ())
    assert harness.starts == 1


@pytest.mark.skipif(not native_bf16(), reason="bf16 is fp32 on a processor without native bf16")
def test_a_requested_bf16_below_its_floor_is_computed_in_fp32(harness: Harness) -> None:
    """As with auto, a note names cosine and floor; torch at bf16, which is as inaccurate, is not tried."""
    harness.describe(precision="fp32")
    _compile_to_bf16(harness, 0.9987)
    description = harness.describe(precision="bf16")
    assert (description.precision, description.backend) == ("fp32", "openvino")
    assert description.notes == ("computed in fp32: its lowest cosine to fp32 at bf16 is 0.99870, below 0.999",)


@pytest.mark.skipif(not native_bf16(), reason="bf16 is fp32 on a processor without native bf16")
def test_a_requested_bf16_above_its_floor_is_served(harness: Harness) -> None:
    """The floor is that of the operator, not the 0.999 of auto."""
    _compile_to_bf16(harness, 0.9987)
    description = harness.describe(precision="bf16", floors={"bf16": 0.998})
    assert (description.precision, description.notes) == ("bf16", ())
    assert harness.starts == 1


AGREEMENTS: dict[str, tuple[str, dict[str, float], str]] = {
    "reranker": ("scores", {"relative_difference": 0.03, "spearman": 0.99}, "the agreement of its scores"),
    "sparse": ("sparse", {"term_overlap": 0.97, "score_error": 0.01}, "the agreement of its sparse vectors"),
    "multi-vector": ("multi_vector", {"maxsim_error": 0.03}, "the agreement of its token vectors"),
}
"""By kind: an output whose agreement with fp32 is 0.97, and what notes call it."""


@pytest.mark.slow
@pytest.mark.skipif(not native_bf16(), reason="auto is fp32 on a processor without native bf16")
@pytest.mark.parametrize("kind", mark_slow_except(AGREEMENTS, "reranker"))
def test_other_kinds_below_their_floor_are_computed_in_fp32(
    kind: str,
    compiled: CompiledModels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As dense models: auto and a requested bf16, with a note that is logged. Above the floor, bf16 is served."""
    output, values, what = AGREEMENTS[kind]
    harness = Harness(compiled(kind), tmp_path, monkeypatch)
    harness.prepare(precision="fp32")
    _claim(harness, {"precision": "bf16"}, {output: values})
    for precision in ("auto", "bf16"):
        caplog.clear()
        prepared = harness.prepare(precision=precision)
        backend = prepared.load()
        backend.close()
        note = f"computed in fp32: {what} with fp32 at bf16 is 0.97000, below 0.98"
        assert (backend.description.precision, backend.description.backend) == ("fp32", "openvino")
        assert backend.description.notes[-1] == note
        assert (prepare.__name__, logging.WARNING, f"model small: {note}") in caplog.record_tuples
    floors = {"bf16": 0.97 - 1e-6}
    prepared = harness.prepare(precision="bf16", agreement_floors=floors)
    assert prepared.description is not None
    assert (prepared.description.precision, prepared.description.notes) == ("bf16", ())


@pytest.mark.parametrize("kind", mark_slow_except(AGREEMENTS, "reranker"))
def test_other_kinds_at_integers_below_their_floor_are_refused(
    kind: str, compiled: CompiledModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As dense models, until the floor is lowered."""
    output, values, what = AGREEMENTS[kind]
    harness = Harness(compiled(kind), tmp_path, monkeypatch)
    _claim(harness, {"precision": "int8", "compute": "fp32"}, {output: values})
    with pytest.raises(AccuracyError) as caught:
        harness.prepare(precision="int8", agreement_floors={"int8": 0.98})
    assert f"not accurate enough at int8: {what} with fp32 is 0.97000" in caught.value.message
    assert "the floor of int8 in EMB_PROVIDER_AGREEMENT_FLOORS is 0.98" in caught.value.message
    prepared = harness.prepare(precision="int8")  # the default floor is 0.95
    assert prepared.description is not None
    assert prepared.description.precision == "int8"
    assert harness.starts == 1


def test_torch_computes_in_fp32_if_a_model_cannot_be_compiled_and_bf16_is_not_accurate_enough(harness: Harness) -> None:
    """With backend=torch, bf16 below its floor is an error instead."""
    harness.configure_compiler(outcome="unsupported")
    description = harness.describe(precision="bf16", floors={"bf16": 1.0})
    assert (description.precision, description.backend) == ("fp32", "torch")
    assert any(note.startswith("computed in fp32: its lowest cosine") for note in description.notes)


# --- static embeddings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("requested", ["auto", "torch"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_static_embeddings_are_served_at_fp32_instead_of_integers(
    requested: str, precision: str, harness: Harness, tmp_path: Path
) -> None:
    """A service-wide precision must not break them. They are not compiled, because there is nothing to compile."""
    harness.directory = save_static(tmp_path / "static")
    loaded = harness.load(precision=precision, backend=requested)
    description = loaded.description
    assert (description.precision, description.backend) == ("fp32", "torch" if requested == "torch" else "numpy")
    assert (
        f"precision {precision}: static embeddings have no matrices to quantize, so fp32 is used" in description.notes
    )
    assert loaded.run(ONE_TOKEN).dense.shape == (1, 24)
    assert harness.starts == 0


def _compile_to_bf16(harness: Harness, min_cosine: float) -> None:
    """Let the fake compiler claim that the model has this lowest cosine at bf16."""
    _claim(harness, {"precision": "bf16"}, {"min_cosine": min_cosine})


def _claim(harness: Harness, description: dict[str, str], fidelity: dict[str, Any]) -> None:
    """Let the fake compiler claim these values of the description and the fidelity.

    The real ones are too low for any test, because the weights of the small models are random.
    """
    copy = harness.root / "claimed"
    shutil.copytree(harness.compiled.artifact.directory, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["description"].update(description)
    for name, value in fidelity.items():
        if isinstance(value, dict):
            manifest["description"]["fidelity"][name].update(value)
        else:
            manifest["description"]["fidelity"][name] = value
    (copy / "manifest.json").write_text(json.dumps(manifest))
    harness.configure_compiler(copy=str(copy))
