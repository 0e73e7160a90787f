"""Models that torch serves below fp32 are measured once, and refused below their floor."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.artifacts.manifest import read_fidelity
from emb_model_provider.artifacts.torch_fidelity import TorchModel, bytes_at_fp32
from emb_model_provider.fidelity.compare import SETTING, AccuracyError
from emb_model_provider.formatting import format_cosine
from emb_model_provider.settings import FidelitySettings
from tests.artifacts.helpers import FAMILY, CompiledModels, Harness
from tests.marks import mark_slow_except
from tests.models import snapshot_of, spec_of

if TYPE_CHECKING:
    from emb_model_provider.backends.base import Backend, Fidelity, ModelDescription

TORCH: dict[str, Any] = {"backend": "torch", "precision": "bf16"}


def records(harness: Harness) -> list[Path]:
    return sorted((harness.cache / "fidelity").glob("*"))


def fidelity_of(description: ModelDescription) -> Fidelity:
    assert description.fidelity is not None
    return description.fidelity


@pytest.fixture(scope="module")
def first_load(compiled: CompiledModels, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelDescription]:
    """Return the record that the first load of a model at bf16 writes, and the description of the model."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        harness = Harness(compiled(FAMILY), tmp_path_factory.mktemp("torch"), monkeypatch)
        description = harness.describe(floors={"bf16": 0.5}, **TORCH)
        (record,) = records(harness)
        return record, description


@pytest.fixture
def record(first_load: tuple[Path, ModelDescription], harness: Harness) -> Path:
    """Return a copy of that record in the cache of the harness."""
    copy = harness.cache / "fidelity" / first_load[0].name
    copy.parent.mkdir(parents=True)
    shutil.copyfile(first_load[0], copy)
    return copy


def test_the_first_load_measures_all_values(first_load: tuple[Path, ModelDescription]) -> None:
    """They are measured over probes and corpus, and recorded in the cache."""
    path, description = first_load
    fidelity = fidelity_of(description)
    assert (description.precision, description.backend, description.notes) == ("bf16", "torch", ())
    assert 0.5 <= fidelity.min_cosine <= fidelity.mean_cosine < 1
    assert fidelity.texts > 300
    assert fidelity.top10_overlap is not None
    assert fidelity.spearman is not None
    assert read_fidelity(json.loads(path.read_text())) == fidelity


def test_the_second_load_uses_the_record(harness: Harness, record: Path) -> None:
    """The floor is compared with the recorded value, whatever it is."""
    values = json.loads(record.read_text())
    assert fidelity_of(harness.describe(floors={"bf16": 0.5}, **TORCH)) == read_fidelity(values)
    changed = json.dumps({**values, "min_cosine": 0.123456})
    record.write_text(changed)
    assert fidelity_of(harness.describe(floors={"bf16": 0.1}, **TORCH)).min_cosine == 0.123456
    with pytest.raises(AccuracyError) as caught:
        harness.load(floors={"bf16": 0.5}, **TORCH)
    message = caught.value.message
    assert "test/small is not accurate enough at bf16: its lowest cosine to fp32 is 0.12345" in message
    assert f"the floor of bf16 in {SETTING} is 0.5" in message
    assert "to fp16 or fp32" in message
    assert record.read_text() == changed
    assert (records(harness), harness.starts) == ([record], 0)


def test_a_damaged_record_is_measured_again(harness: Harness, record: Path) -> None:
    """It is written even if the model is refused, so that the next load is refused at once."""
    before = json.loads(record.read_text())["min_cosine"]
    record.write_text("{")
    with pytest.raises(AccuracyError) as first:
        harness.load(floors={"bf16": 1.0}, **TORCH)
    again = json.loads(record.read_text())["min_cosine"]
    assert again == pytest.approx(before, abs=1e-3)
    assert f"lowest cosine to fp32 is {format_cosine(again)} over" in first.value.message
    written = record.stat().st_mtime_ns
    with pytest.raises(AccuracyError) as second:
        harness.load(floors={"bf16": 1.0}, **TORCH)
    assert second.value.message == first.value.message
    assert record.stat().st_mtime_ns == written


def test_a_note_says_that_a_model_was_not_measured(harness: Harness) -> None:
    """With MEASURE_FIDELITY=false there is no record, no floor, and a note that names both settings."""
    description = harness.describe(floors={"bf16": 1.0}, measure=False, **TORCH)
    assert description.fidelity is None
    (note,) = [note for note in description.notes if SETTING in note]
    assert "at bf16" in note
    assert "EMB_PROVIDER_MEASURE_FIDELITY=false" in note
    assert records(harness) == []


def test_a_record_is_used_even_if_measuring_is_disabled(harness: Harness, record: Path) -> None:
    """The floor applies, and there is no note."""
    description = harness.describe(floors={"bf16": 0.0}, measure=False, **TORCH)
    assert fidelity_of(description) == read_fidelity(json.loads(record.read_text()))
    assert description.notes == ()
    with pytest.raises(AccuracyError):
        harness.load(floors={"bf16": 1.0}, measure=False, **TORCH)


@pytest.mark.parametrize("kind", mark_slow_except(["reranker", "classifier", "sparse", "multi-vector"], "reranker"))
def test_other_kinds_are_measured_once_and_refused_below_their_floor(
    kind: str, compiled: CompiledModels, tmp_path: Path
) -> None:
    """As dense models, by the agreement of their output."""
    snapshot = snapshot_of(compiled.directory(kind))

    def load(floor: float) -> Backend:
        floors = FidelitySettings(agreement_floors={"bf16": floor})
        return TorchModel(spec_of(**TORCH), snapshot, False, tmp_path, floors).load()

    with pytest.raises(AccuracyError) as caught:
        load(1.0)
    (record,) = (tmp_path / "fidelity").glob("*")
    fidelity = read_fidelity(json.loads(record.read_text()))
    ((output, agreement),) = fidelity.agreement.items()
    assert output in ("scores", "sparse", "multi_vector")
    assert fidelity.texts > 100
    assert agreement < 1
    assert f"with fp32 is {format_cosine(agreement)} over {fidelity.texts} texts" in caught.value.message
    assert "the floor of bf16 in EMB_PROVIDER_AGREEMENT_FLOORS is 1" in caught.value.message
    written = record.stat().st_mtime_ns
    backend = load(0.0)
    backend.close()
    assert (backend.description.precision, backend.description.fidelity) == ("bf16", fidelity)
    assert record.stat().st_mtime_ns == written


@pytest.mark.parametrize("precision", ["fp32", "auto"])
def test_torch_at_fp32_is_the_reference(precision: str, harness: Harness) -> None:
    """It has no fidelity and no floor, but ranges for integers. auto is fp32 on a CPU."""
    description = harness.describe(floors={"fp32": 1.0}, backend="torch", precision=precision)
    assert (description.precision, description.fidelity, description.notes) == ("fp32", None, ())
    assert description.calibration is not None


def test_ranges_at_fp32_are_measured_once(harness: Harness) -> None:
    """They are kept in a record, because the same text must have the same integers after a restart."""
    first = harness.describe(backend="torch", precision="fp32").calibration
    (path,) = records(harness)
    content = json.loads(path.read_bytes())
    content["calibration"]["spread"] = 12.5
    path.write_text(json.dumps(content), encoding="utf-8")
    second = harness.describe(backend="torch", precision="fp32", measure=False).calibration
    assert first is not None
    assert second == replace(first, spread=12.5)


def test_ranges_are_not_measured_if_measuring_is_disabled(harness: Harness) -> None:
    assert harness.describe(backend="torch", precision="fp32", measure=False).calibration is None
    assert records(harness) == []
    assert records(harness) == []


def test_a_record_belongs_to_one_pipeline(harness: Harness, record: Path) -> None:
    """Alias and prompts do not change the vectors of texts; pooling and maximum length do."""
    known = read_fidelity(json.loads(record.read_text()))
    for changed in ({"alias": "other"}, {"prompts": {"query": "q: "}}):
        description = harness.describe(floors={"bf16": 0.0}, measure=False, **TORCH, **changed)
        assert fidelity_of(description) == known
    for changed in ({"pooling": "cls"}, {"max_length": 20}):
        assert harness.describe(measure=False, **TORCH, **changed).fidelity is None


def test_a_model_that_does_not_fit_at_fp32_is_not_measured(harness: Harness, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is served without a measurement, and a note names both sizes."""
    monkeypatch.setattr("emb_model_provider.artifacts.torch_fidelity.free_memory", lambda: 1000)
    description = harness.describe(floors={"bf16": 1.0}, **TORCH)
    assert description.fidelity is None
    (note,) = description.notes
    assert "it needs about" in note
    assert "1.0 kB are free" in note


def test_memory_at_fp32_is_estimated_from_the_files(compiled: CompiledModels, tmp_path: Path) -> None:
    """Weights that are stored at half precision take twice as much at fp32."""
    directory = Path(shutil.copytree(compiled.directory(FAMILY), tmp_path / "model"))
    whole = bytes_at_fp32(snapshot_of(directory))
    assert whole > (directory / "model.safetensors").stat().st_size
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert bytes_at_fp32(snapshot_of(directory)) == 2 * whole
