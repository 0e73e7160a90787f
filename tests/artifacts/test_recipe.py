"""Recipes: what an artifact depends on, and which artifacts of other machines can be used."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from emb_model_provider.artifacts import recipe as recipes
from emb_model_provider.artifacts.recipe import Recipe, precision_note, recipe_for
from tests.artifacts.helpers import FAMILY, CompiledModels
from tests.models import snapshot_of, spec_of

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def directory(compiled: CompiledModels) -> Path:
    return compiled.directory(FAMILY)


def recipe(directory: Path, precision: str = "int8", *, bf16: bool = True, int8: bool = False) -> Recipe:
    return recipe_for(
        spec_of(precision=precision), snapshot_of(directory), trust_remote_code=False, native_bf16=bf16, fast_int8=int8
    )


@pytest.mark.parametrize(
    ("precision", "bf16", "int8", "weights", "compute"),
    [
        ("auto", True, False, "fp32", ("bf16", "fp32")),
        ("auto", False, False, "fp32", ("fp32",)),
        ("fp32", True, True, "fp32", ("fp32",)),
        ("bf16", True, False, "fp32", ("bf16",)),
        ("fp16", True, False, "fp16", ("bf16", "fp32")),
        ("int8", True, True, "int8", ("int8", "bf16", "fp32")),
        ("int4", False, False, "int4", ("fp32",)),
    ],
)
def test_precisions_depend_on_the_processor(
    precision: str, bf16: bool, int8: bool, weights: str, compute: tuple[str, ...], directory: Path
) -> None:
    """Weights have the requested precision, and the fastest computation is tried first."""
    found = recipe(directory, precision, bf16=bf16, int8=int8)
    assert (found.weights, found.compute) == (weights, compute)


def test_only_quantized_artifacts_depend_on_nncf(directory: Path) -> None:
    """Another version of nncf compiles only int8 and int4 models again."""
    assert recipe(directory, "int8").versions["nncf"] == recipes.installed_version("nncf")
    assert "nncf" not in recipe(directory, "fp32").versions


def test_an_artifact_of_another_processor_can_serve(directory: Path) -> None:
    """If it needs no precision that this processor does not have; every processor can compute in int8."""
    fast, usual, old = recipe(directory, int8=True), recipe(directory), recipe(directory, bf16=False)
    assert usual.can_serve(fast.as_json())
    assert fast.can_serve(usual.as_json())
    assert fast.can_serve(old.as_json())
    assert not old.can_serve(fast.as_json())


def test_tools_that_are_not_installed_are_not_compared(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without nncf can serve what nncf has quantized."""
    with_nncf = recipe(directory)
    real = recipes.installed_version
    monkeypatch.setattr(recipes, "installed_version", lambda name: None if name == "nncf" else real(name))
    assert recipe(directory).key != with_nncf.key
    assert recipe(directory).can_serve(with_nncf.as_json())


def test_a_note_says_how_integer_weights_are_stored_and_computed() -> None:
    """int8 and int4 always have a note."""
    assert precision_note("int8", "bf16", native_bf16=True) == (
        "precision int8 on a CPU: weights are stored in 8 bits; the model computes in bf16, about as fast as at "
        "precision auto"
    )
    assert "in 4 bits if that costs little accuracy" in str(precision_note("int4", "fp32", native_bf16=False))


@pytest.mark.parametrize(
    ("gain", "bf16", "expected"),
    [
        (1.607, False, "1.61 times as fast as in fp32 on this processor"),
        (0.9, True, "0.90 times as fast as in bf16 on this processor"),
        (None, True, "its speed on this processor was not measured: emb-provider tune MODEL"),
    ],
)
def test_a_note_says_how_fast_quantized_activations_are(gain: float | None, bf16: bool, expected: str) -> None:
    """Relative to the precision of `auto`, and also if they are slower."""
    note = str(precision_note("int4", "int8", native_bf16=bf16, int8_gain=gain))
    assert note.endswith(f"the model computes with activations as 8-bit integers ({expected})")


def test_only_quantized_artifacts_are_compiled_again_for_another_rounding(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An artifact that was rounded otherwise does not serve, not even where nothing can be compiled."""
    exact, quantized = recipe(directory, "fp32"), recipe(directory, "int8")
    keys, old = (exact.key, quantized.key), quantized.as_json()
    monkeypatch.setattr(recipes, "_QUANTIZED_FORMAT", 1000)
    assert exact.key == keys[0]
    assert quantized.key != keys[1]
    assert not quantized.can_serve(old)


def test_there_is_no_note_if_the_requested_precision_is_used() -> None:
    assert precision_note("fp32", "fp32", native_bf16=True) is None
    assert precision_note("bf16", "bf16", native_bf16=True) is None
    assert precision_note("auto", "bf16", native_bf16=True) is None


def test_the_processor_is_the_reason_for_fp32_only_if_it_has_no_bf16() -> None:
    """Otherwise the artifact says that bf16 is not accurate enough."""
    assert "does not support bf16 natively" in str(precision_note("bf16", "fp32", native_bf16=False))
    assert precision_note("bf16", "fp32", native_bf16=True) is None
