"""int8 and int4: smaller, near enough, and told as what they are."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from emb_model_provider.artifacts import recipe as recipes
from emb_model_provider.artifacts.manifest import FILES, GRAPH, MANIFEST, WEIGHTS
from emb_model_provider.artifacts.recipe import precision_note, recipe_for
from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.backends.hardware import fast_int8, native_bf16
from emb_model_provider.backends.openvino_cpu.backend import OpenVinoBackend
from emb_model_provider.backends.openvino_cpu.runtime import openvino
from emb_model_provider.compiler import build as making
from emb_model_provider.compiler import quantize as quantizing
from emb_model_provider.compiler.export import quietly
from emb_model_provider.compiler.quantize import QuantizeError
from emb_model_provider.fidelity.compare import MismatchError, reference_cases
from emb_model_provider.fidelity.texts import CALIBRATION, PROBES, corpus
from tests.backends.comparison import TEXTS, cosines, embed_texts, reference
from tests.compile.conftest import compile_here
from tests.models import snapshot_of, spec_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.backends.base import ComputePrecision, ModelDescription
    from emb_model_provider.compiler.quantize import QuantizedWeights
    from emb_model_provider.fidelity.compare import Case
    from tests.compile.conftest import Compiled
    from tests.compile.service import Service

FAMILY = "bert-mean-normalize"
FAMILY_FLOORS = {"int8": 0.94, "int4": 0.7}
"""Random weights drawn wide are the worst case: nothing in them is redundant, and rows are of 48 values."""


@pytest.fixture(autouse=True)
def measured_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random models are measured once, and on a small part of the corpus: what is measured is tested elsewhere."""
    monkeypatch.setattr("tests.compile.conftest.fast_int8", lambda: False)
    monkeypatch.setattr("emb_model_provider.fidelity.compare.corpus", lambda _share=0.0: corpus(0))


def size_of(made: Compiled) -> int:
    return (made.artifact.directory / WEIGHTS).stat().st_size


# --- the families -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize(
    "family", ["bert-cls", "bert-dense", "xlm-roberta", "mpnet", "modernbert", "qwen3-left"]
)
def test_every_family_is_near_its_reference(
    family: str, precision: QuantizedWeights, compiled: Callable[..., Compiled], tmp_path: Path
) -> None:
    """Its graph can be quantized, is smaller, loads at every computation, and gives finite vectors above a floor."""
    exact = compiled(family, precision="fp32")
    texts = TEXTS + list(PROBES[24:60])
    expected = embed_texts(exact.load(), texts)
    description = replace(exact.artifact.description, precision=precision)
    whole = openvino().Core().read_model(exact.artifact.directory / GRAPH)
    with quietly():
        graph = quantizing.quantize(whole, precision, description)
    openvino().save_model(graph, tmp_path / GRAPH, compress_to_fp16=False)
    assert (tmp_path / WEIGHTS).stat().st_size < 0.4 * size_of(exact)
    computations: list[ComputePrecision] = ["fp32", "bf16", "int8"]
    for compute in computations:
        backend = OpenVinoBackend(tmp_path / GRAPH, replace(description, compute=compute), cpus=1)
        vectors = embed_texts(backend, texts)
        backend.close()
        assert vectors.shape == expected.shape
        assert np.isfinite(vectors).all()
        near = cosines(vectors, expected)
        assert near.min() >= FAMILY_FLOORS[precision]
        assert near.min() < 0.99999


@pytest.mark.parametrize(("family", "precision"), [(FAMILY, "int8"), ("qwen3-left", "int4")])
def test_an_artifact_is_made_measured_and_served(
    family: str, precision: str, compiled: Callable[..., Compiled]
) -> None:
    """All of the way: what is measured is what is served, and the exact graph does not stay on disk."""
    made = compiled(family, precision=precision)
    expected = reference(made.directory).encode(TEXTS, batch_size=5, show_progress_bar=False)
    vectors = embed_texts(made.load(), TEXTS)
    assert cosines(vectors, expected).min() >= FAMILY_FLOORS[precision]
    fidelity = made.artifact.description.fidelity
    assert fidelity is not None
    assert FAMILY_FLOORS[precision] <= fidelity.min_cosine < 0.99999
    assert sorted(path.name for path in made.artifact.directory.iterdir()) == sorted([*FILES, MANIFEST])


# --- the bundled model ------------------------------------------------------------------------------------------


@cache
def _cases() -> list[list[Case]]:
    return []


def bundled_cases(pipeline: Any, description: ModelDescription) -> list[Case]:
    """Return the bundled model's own vectors of all that is compared; they take long, and are made once."""
    if not _cases():
        _cases().append(reference_cases(pipeline, description))
    return _cases()[0]


@pytest.mark.parametrize(
    ("precision", "least", "overlap", "share"), [("int8", 0.995, 0.97, 0.30), ("int4", 0.97, 0.92, 0.22)]
)
def test_the_bundled_model_reaches_what_is_promised(
    precision: str,
    least: float,
    overlap: float,
    share: float,
    compiled: Callable[..., Compiled],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Lowest cosine, neighbours kept and size on disk, as this processor computes it best."""
    monkeypatch.setattr("tests.compile.conftest.fast_int8", fast_int8)
    monkeypatch.setattr("emb_model_provider.fidelity.compare.corpus", corpus)
    monkeypatch.setattr(making, "reference_cases", bundled_cases)
    made = compiled("bundled", precision=precision, alias="bundled")
    fidelity = made.artifact.description.fidelity
    assert fidelity is not None
    assert fidelity.min_cosine >= least
    assert fidelity.top10_overlap is not None
    assert fidelity.top10_overlap >= overlap
    assert size_of(made) <= share * size_of(compiled("bundled", precision="fp32"))
    assert made.artifact.description.compute in {
        "int8" if fast_int8() else "",
        "bf16" if native_bf16() else "fp32",
    }
    assert made.phases[-5:] == ["verify", f"quantize to {precision}", "save", "measure", "write"]
    backend = made.load()
    assert backend.embed(TokenBatch(ids=[[101, 7592, 102]], prompt_lengths=[0])).shape == (1, 384)


# --- what is told -----------------------------------------------------------------------------------------------


def test_the_manifest_names_precision_computation_and_quantizer(compiled: Callable[..., Compiled]) -> None:
    """Another nncf makes another artifact, of quantized ones only."""
    manifest = json.loads(
        (compiled(FAMILY, precision="int8").artifact.directory / "manifest.json").read_text()
    )
    assert manifest["recipe"]["weights"] == "int8"
    assert manifest["recipe"]["versions"]["nncf"] == recipes.installed_version("nncf")
    assert manifest["description"]["precision"] == "int8"
    assert manifest["description"]["compute"] == ("bf16" if native_bf16() else "fp32")
    exact = json.loads((compiled(FAMILY, precision="fp32").artifact.directory / "manifest.json").read_text())
    assert "nncf" not in exact["recipe"]["versions"]
    assert exact["description"]["compute"] is None


def test_the_note_says_how_weights_are_stored_and_computed() -> None:
    """For int8 and int4 it is always there."""
    assert precision_note("int8", "bf16") == (
        "precision int8 on a CPU: weights are stored in 8 bits, and computed in bf16"
    )
    assert "with activations as 8-bit integers" in str(precision_note("int4", "int8"))
    assert "in 4 bits where that costs least" in str(precision_note("int4", "fp32"))


def test_a_quantized_artifact_is_used_again(
    service: Service, compiled: Callable[..., Compiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second start compiles nothing; another nncf does."""
    service.made = compiled(FAMILY, precision="int8")
    service.child_does()
    for _ in range(2):
        description = service.prepare(precision="int8").load().description
        assert description.precision == "int8"
        assert any("weights are stored in 8 bits" in note for note in description.notes)
    assert service.starts == 1
    real = recipes.installed_version
    monkeypatch.setattr(recipes, "installed_version", lambda name: "99" if name == "nncf" else real(name))
    service.prepare(precision="int8")
    assert service.starts == 2


def test_an_artifact_serves_where_nncf_is_not_installed(
    compiled: Callable[..., Compiled], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor need the processor be the same: one that has no fast integers serves what was made with them."""
    made = compiled(FAMILY, precision="int8")
    spec, snapshot = spec_of(precision="int8"), snapshot_of(made.directory)

    def recipe(*, fast: bool, bf16: bool = True) -> Any:
        return recipe_for(spec, snapshot, trust_remote_code=False, native_bf16=bf16, fast_int8=fast)

    quick, plain, old = recipe(fast=True), recipe(fast=False), recipe(fast=False, bf16=False)
    assert quick.compute == ("int8", "bf16", "fp32")
    assert plain.can_serve(quick.as_json())
    assert quick.can_serve(plain.as_json())
    assert quick.can_serve(old.as_json())
    assert not old.can_serve(quick.as_json())
    real = recipes.installed_version
    monkeypatch.setattr(recipes, "installed_version", lambda name: None if name == "nncf" else real(name))
    assert recipe(fast=True).can_serve(quick.as_json())


@pytest.mark.parametrize(
    ("flags", "fast"),
    [
        ("avx512_vnni avx512_bf16", True),
        ("avx512_vnni", True),
        ("avx512_vnni amx_bf16", False),
        ("avx2", False),
    ],
)
def test_integers_are_fast_where_vnni_is_and_amx_is_not(flags: str, fast: bool, tmp_path: Path) -> None:
    """Read from the processor's flags; no where they cannot be read."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\nflags\t\t: fpu {flags} sse\n")
    assert fast_int8(tmp_path) is fast
    assert fast_int8(tmp_path / "elsewhere") is False


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_what_nncf_cannot_quantize_is_not_served_at_fp32(
    compiled: Callable[..., Compiled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unsupported, with nncf's own message."""

    def fails(*_: object, **__: object) -> Any:
        raise RuntimeError("no such\nthing")

    directory = compiled(FAMILY, precision="fp32").directory
    monkeypatch.setattr("nncf.compress_weights", fails)
    result, _ = compile_here(directory, tmp_path, precision="int4")
    assert result.outcome == "unsupported"
    assert "nncf cannot quantize it to int4: RuntimeError: no such thing" in result.reason
    assert not (tmp_path / "manifest.json").exists()


def test_a_wrong_conversion_is_refused_before_it_is_quantized(
    compiled: Callable[..., Compiled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error would else pass for the cost of quantizing."""

    def untrue(*_: object, **options: object) -> Any:
        assert options["exact"]
        raise MismatchError("cosine 0.5")

    directory = compiled(FAMILY, precision="fp32").directory
    monkeypatch.setattr(making, "compare", untrue)
    result, phases = compile_here(directory, tmp_path, precision="int8")
    assert result.outcome == "refused"
    assert "quantize to int8" not in phases


def test_activations_become_integers_only_where_that_is_true_enough(
    compiled: Callable[..., Compiled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small random models are not: the weights' integers are computed in bf16 or fp32, and a note says why."""
    monkeypatch.setattr("tests.compile.conftest.fast_int8", lambda: True)
    monkeypatch.setattr(making, "ACCURACY_TARGETS", {"int8": (0.9, 1.1)})
    result, _ = compile_here(compiled(FAMILY, precision="fp32").directory, tmp_path, precision="int8")
    assert result.outcome == "done"
    description = json.loads((tmp_path / "manifest.json").read_text())["description"]
    assert description["compute"] == ("bf16" if native_bf16() else "fp32")
    assert any("not true enough with activations in 8 bits" in note for note in description["notes"])


def test_a_graph_without_weights_is_left_as_it_is(compiled: Callable[..., Compiled]) -> None:
    """There is nothing to quantize, which is no failure."""
    import openvino

    ops = openvino.opset13
    ids = ops.parameter([-1, -1], dtype=np.int64, name="input_ids")
    graph = openvino.Model([ops.convert(ids, "f32")], [ids], "plain")
    description = compiled(FAMILY, precision="fp32").artifact.description
    assert quantizing.quantize(graph, "int4", description) is graph


def test_nncf_reports_nothing_and_is_not_imported_by_serving() -> None:
    """Neither importing what serves nor the recipe brings it in; where it is imported, its telemetry is a stand-in."""
    code = (
        "import sys\n"
        "import emb_model_provider.artifacts.prepare, emb_model_provider.backends.openvino_cpu.backend\n"
        "assert 'nncf' not in sys.modules\n"
        "from emb_model_provider.backends.openvino_cpu.runtime import openvino\n"
        "openvino()\n"
        "from nncf.telemetry import telemetry\n"
        "print(type(telemetry).__name__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.split()[-1] == "MagicMock"


def test_quantize_error_is_no_oserror() -> None:
    """Else the child would tell it as a disk that is full."""
    assert not issubclass(QuantizeError, OSError)


# --- calibration ----------------------------------------------------------------------------------------------------


def test_nothing_is_measured_on_what_it_was_calibrated_on() -> None:
    """Calibration texts, probes and corpus have none in common."""
    assert 100 <= len(set(CALIBRATION)) == len(CALIBRATION) <= 300
    assert not set(CALIBRATION) & {*PROBES, *corpus()}
