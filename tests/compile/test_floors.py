"""A model is served only where it is true enough to fp32, and how true it is is measured once."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.artifacts.manifest import read_fidelity
from emb_model_provider.artifacts.prepare import PreparedBackend, prepare_backend
from emb_model_provider.backends.hardware import native_bf16
from emb_model_provider.fidelity.thresholds import SETTING, AccuracyError
from emb_model_provider.formatting import format_cosine
from emb_model_provider.settings import FIDELITY_FLOORS, FidelitySettings
from tests.compile.service import FAMILY, ONE_TOKEN, Service
from tests.models import snapshot_of, spec_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.backends.base import Fidelity, ModelDescription
    from tests.compile.conftest import Compiled


def prepare(
    service: Service, floors: dict[str, float] | None = None, *, measure: bool = True, **spec: Any
) -> PreparedBackend:
    """Prepare the service's model with floors over the usual ones."""

    def announce() -> None:
        service.announced += 1

    return prepare_backend(
        spec_of(**spec),
        snapshot_of(service.directory),
        trust_remote_code=False,
        cache_dir=service.cache,
        max_cache_bytes=service.max_bytes,
        on_compiling=announce,
        fidelity=FidelitySettings(fidelity_floors=floors or {}, measure_fidelity=measure),
    )


def loaded(prepared: PreparedBackend) -> ModelDescription:
    """Load a model, let it embed, and return what it is."""
    backend = prepared.load()
    try:
        assert backend.embed(ONE_TOKEN).shape == (1, 48)
        return backend.description
    finally:
        backend.close()


def measured(description: ModelDescription) -> Fidelity:
    assert description.fidelity is not None
    return description.fidelity


def refused(prepare_it: Callable[[], object]) -> str:
    with pytest.raises(AccuracyError) as caught:
        prepare_it()
    assert "\n" not in caught.value.message
    return caught.value.message


# --- compiled -----------------------------------------------------------------------------------------------------


@pytest.fixture
def int8(compiled: Callable[..., Compiled], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Service:
    """Return a service whose model was compiled at int8."""
    return Service(compiled(FAMILY, precision="int8"), tmp_path, monkeypatch)


def test_a_compiled_model_below_its_floor_is_refused_until_the_floor_is_lowered(int8: Service) -> None:
    """The one line names model, figure, floor, setting and what to choose; then nothing is compiled anew."""
    found = int8.made.artifact.description.fidelity
    assert found is not None
    assert found.min_cosine < 1
    message = refused(lambda: prepare(int8, {"int8": 1.0}, precision="int8"))
    assert message.startswith("test/small is not true enough at int8")
    assert f"{format_cosine(found.min_cosine)} over {found.texts} texts" in message
    assert f"the floor of int8 in {SETTING} is 1" in message
    assert "to bf16, fp16 or fp32, or lower that floor" in message
    description = loaded(prepare(int8, {"int8": found.min_cosine - 0.001}, precision="int8"))
    assert (description.backend, description.precision) == ("openvino", "int8")
    assert description.fidelity == found
    assert (int8.starts, int8.announced) == (1, 1)


def test_a_floor_that_is_just_reached_is_reached(int8: Service) -> None:
    """The floor is the lowest cosine that is served; anything above it is not."""
    found = int8.made.artifact.description.fidelity
    assert found is not None
    assert measured(loaded(prepare(int8, {"int8": found.min_cosine}, precision="int8"))) == found
    refused(lambda: prepare(int8, {"int8": found.min_cosine + 1e-6}, precision="int8"))


def test_the_floor_is_that_of_the_precision_that_was_asked_for(int8: Service) -> None:
    """int8 is computed in something else; the floors of all others do not bind it, whatever it is."""
    others = dict.fromkeys(set(FIDELITY_FLOORS) - {"int8"}, 1.0)
    assert loaded(prepare(int8, {**others, "int8": 0.0}, precision="int8")).precision == "int8"


def test_fp32_below_its_floor_is_advised_to_lower_it(service: Service) -> None:
    """There is nothing truer to choose, and for auto the line speaks of what it became."""
    for precision in ("fp32", "auto"):
        message = refused(lambda precision=precision: prepare(service, {"fp32": 1.0}, precision=precision))  # type: ignore[misc]
        assert "not true enough at fp32" in message
        assert message.endswith("Lower that floor.")
    assert loaded(prepare(service, precision="fp32")).precision == "fp32"


def test_compiled_models_are_measured_though_measuring_is_off(service: Service) -> None:
    """MEASURE_FIDELITY is about torch: a compiled model was verified, so its floor binds."""
    refused(lambda: prepare(service, {"fp32": 1.0}, measure=False, precision="fp32"))
    assert measured(loaded(prepare(service, measure=False, precision="fp32"))).min_cosine >= 0.999


@pytest.mark.skipif(not native_bf16(), reason="auto is fp32 on a processor without bf16 of its own")
@pytest.mark.parametrize("floor", [0.0, 1.0])
def test_auto_serves_fp32_where_bf16_is_not_true_enough(floor: float, service: Service) -> None:
    """By the operator's floor or by auto's own: a note says how far bf16 was off, and fp32 is found, not made again."""
    loaded(prepare(service, precision="fp32"))
    assert service.starts == 1
    untrue = 0.9995 if floor == 1.0 else 0.9985
    _as_though_at_bf16(service, untrue)
    description = loaded(prepare(service, {"bf16": floor}, precision="auto"))
    assert (description.precision, description.backend) == ("fp32", "openvino")
    least = "1" if floor == 1.0 else "0.999"
    assert (
        f"computed in fp32: its lowest cosine to fp32 at bf16 is {untrue:.5f}, below {least}"
        in description.notes
    )
    assert service.starts == 2
    assert loaded(prepare(service, {"bf16": floor}, precision="auto")).precision == "fp32"
    assert service.starts == 2


@pytest.mark.skipif(not native_bf16(), reason="auto is fp32 on a processor without bf16 of its own")
def test_auto_serves_bf16_where_it_is_true_enough(service: Service) -> None:
    """Nothing is noted, and nothing made at fp32."""
    _as_though_at_bf16(service, 0.9995)
    description = loaded(prepare(service, precision="auto"))
    assert (description.precision, description.notes) == ("bf16", ())
    assert service.starts == 1


def _as_though_at_bf16(service: Service, min_cosine: float) -> None:
    """Let the child hand in, from now on, the model as though it had been found this true at bf16.

    The small models have random weights, and bf16 is never true to those.
    """
    copy = service.root / f"bf16-{min_cosine}"
    shutil.copytree(service.made.artifact.directory, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["description"]["precision"] = "bf16"
    manifest["description"]["fidelity"]["min_cosine"] = min_cosine
    (copy / "manifest.json").write_text(json.dumps(manifest))
    service.child_does(copy=str(copy))


# --- torch --------------------------------------------------------------------------------------------------------

TORCH: dict[str, Any] = {"backend": "torch", "precision": "bf16"}


def figures(service: Service) -> list[Path]:
    """Return the files of the figures that are kept."""
    return sorted((service.cache / "fidelity").glob("*"))


@pytest.fixture(scope="module")
def first_load(
    compiled: Callable[..., Compiled], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, ModelDescription]:
    """Return the file that the first load of a model at bf16 has left, and what that load gave."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        service = Service(compiled(FAMILY, precision="fp32"), tmp_path_factory.mktemp("torch"), monkeypatch)
        description = loaded(prepare(service, {"bf16": 0.5}, **TORCH))
        (kept,) = figures(service)
        return kept, description


@pytest.fixture
def kept(first_load: tuple[Path, ModelDescription], service: Service) -> Path:
    """Return that file, copied into the cache of this test's service."""
    copy = service.cache / "fidelity" / first_load[0].name
    copy.parent.mkdir(parents=True)
    shutil.copyfile(first_load[0], copy)
    return copy


def test_what_torch_serves_is_measured(first_load: tuple[Path, ModelDescription]) -> None:
    """All figures, over probes and corpus, with nothing to note; they are what the cache keeps."""
    path, description = first_load
    first = measured(description)
    assert (description.precision, description.backend, description.notes) == ("bf16", "torch", ())
    assert 0.5 <= first.min_cosine <= first.mean_cosine < 1
    assert first.texts > 300
    assert first.top10_overlap is not None
    assert first.spearman is not None
    assert read_fidelity(json.loads(path.read_text())) == first


def test_torch_is_measured_once(service: Service, kept: Path) -> None:
    """The second load has the figure that is kept, whatever it is, and the floor is asked of that."""
    values = json.loads(kept.read_text())
    assert measured(loaded(prepare(service, {"bf16": 0.5}, **TORCH))) == read_fidelity(values)
    changed = json.dumps({**values, "min_cosine": 0.123456})
    kept.write_text(changed)
    assert measured(loaded(prepare(service, {"bf16": 0.1}, **TORCH))).min_cosine == 0.123456
    message = refused(lambda: prepare(service, {"bf16": 0.5}, **TORCH).load())
    assert "test/small is not true enough at bf16: its lowest cosine to fp32 is 0.12345" in message
    assert f"the floor of bf16 in {SETTING} is 0.5" in message
    assert "to fp16 or fp32" in message
    assert kept.read_text() == changed
    assert (figures(service), service.starts) == ([kept], 0)


def test_a_figure_that_is_damaged_is_measured_anew(service: Service, kept: Path) -> None:
    """It is written again, though it is below the floor and the model is refused: the next start is told at once."""
    before = json.loads(kept.read_text())["min_cosine"]
    kept.write_text("{")
    message = refused(lambda: prepare(service, {"bf16": 1.0}, **TORCH).load())
    again = json.loads(kept.read_text())["min_cosine"]
    assert again == pytest.approx(before, abs=1e-3)
    assert f"lowest cosine to fp32 is {format_cosine(again)} over" in message
    stamp = kept.stat().st_mtime_ns
    assert refused(lambda: prepare(service, {"bf16": 1.0}, **TORCH).load()) == message
    assert kept.stat().st_mtime_ns == stamp


def test_torch_that_is_not_measured_says_so(service: Service) -> None:
    """MEASURE_FIDELITY=false: no figure, no file, a note that names both settings, and no floor that could bind."""
    description = loaded(prepare(service, {"bf16": 1.0}, measure=False, **TORCH))
    assert description.fidelity is None
    (note,) = [note for note in description.notes if SETTING in note]
    assert "at bf16" in note
    assert "EMB_PROVIDER_MEASURE_FIDELITY=false" in note
    assert figures(service) == []


def test_a_figure_that_is_known_binds_though_measuring_is_off(service: Service, kept: Path) -> None:
    """What was measured earlier is used: the floor is asked, and nothing is noted."""
    description = loaded(prepare(service, {"bf16": 0.0}, measure=False, **TORCH))
    assert measured(description) == read_fidelity(json.loads(kept.read_text()))
    assert description.notes == ()
    refused(lambda: prepare(service, {"bf16": 1.0}, measure=False, **TORCH).load())


def test_torch_at_fp32_is_the_reference_and_is_not_measured(service: Service) -> None:
    """Neither asked for nor chosen by auto, which is fp32 on a CPU: it has no figure, and no floor can refuse it."""
    for precision in ("fp32", "auto"):
        description = loaded(prepare(service, {"fp32": 1.0}, backend="torch", precision=precision))
        assert (description.precision, description.fidelity, description.notes) == ("fp32", None, ())
    assert figures(service) == []


def test_a_figure_is_of_one_pipeline(service: Service, kept: Path) -> None:
    """An alias and prompts of the operator do not change it; with other pooling or length it is not known."""
    known = read_fidelity(json.loads(kept.read_text()))
    for changed in ({"alias": "other"}, {"prompts": {"query": "q: "}}):
        description = loaded(prepare(service, {"bf16": 0.0}, measure=False, **TORCH, **changed))
        assert measured(description) == known
    for changed in ({"pooling": "cls"}, {"max_length": 20}):
        assert loaded(prepare(service, measure=False, **TORCH, **changed)).fidelity is None


# --- words --------------------------------------------------------------------------------------------------------


def test_a_cosine_is_shown_cut() -> None:
    """What is not 1 is not told as 1."""
    assert format_cosine(0.999996) == "0.99999"
    assert format_cosine(1.0) == "1.00000"
    assert format_cosine(0.97) == "0.97000"
