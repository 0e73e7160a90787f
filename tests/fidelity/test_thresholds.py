"""A model whose lowest cosine, or other agreement with fp32, is below the floor of its precision is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.backends.base import Fidelity, MultiVectorFidelity, ScoreFidelity, SparseFidelity
from emb_model_provider.fidelity.compare import AccuracyError, check_accuracy
from emb_model_provider.formatting import format_cosine
from emb_model_provider.settings import AGREEMENT_FLOORS, FIDELITY_FLOORS
from tests.models import spec_of

if TYPE_CHECKING:
    from emb_model_provider.backends.base import ComputePrecision
    from emb_model_provider.model_spec import Precision


def check(requested: Precision, computed: ComputePrecision, min_cosine: float | None, **floors: float) -> None:
    fidelity = None if min_cosine is None else Fidelity(min_cosine=min_cosine, mean_cosine=1.0, texts=500)
    # The name in the settings can be a commit hash, if the model is a directory in a cache.
    spec = spec_of(name="5c38ec7c405ec4b44b94cc5a9bb96e735b38267a", precision=requested)
    check_accuracy(spec, computed, fidelity, {**FIDELITY_FLOORS, **floors}, AGREEMENT_FLOORS, name="test/small")


def test_the_floor_is_the_lowest_allowed_cosine() -> None:
    check("int8", "int8", 0.97, int8=0.97)
    with pytest.raises(AccuracyError):
        check("int8", "int8", 0.97 - 1e-9, int8=0.97)


def test_a_model_that_was_not_measured_passes() -> None:
    check("int4", "int4", None, int4=1.0)


def test_the_floor_of_the_requested_precision_applies() -> None:
    """Also if the model computes in another precision."""
    check("fp16", "bf16", 0.95, fp16=0.9, bf16=1.0)
    with pytest.raises(AccuracyError, match="at fp16"):
        check("fp16", "bf16", 0.95, fp16=0.96, bf16=0.0)


def test_auto_has_its_own_floor() -> None:
    """Below 0.999 it falls back to fp32, however low the floors are. At fp32 the configured floor applies."""
    check("auto", "bf16", 0.9995, bf16=0.5)
    with pytest.raises(AccuracyError, match=r"at bf16.*is 0\.999"):
        check("auto", "bf16", 0.9985, bf16=0.5)
    check("auto", "fp32", 0.6, fp32=0.5)


@pytest.mark.parametrize(
    ("precision", "advice"),
    [
        ("int4", "to int8, bf16, fp16 or fp32, or lower that floor."),
        ("bf16", "to fp16 or fp32, or lower that floor."),
        ("fp32", "Lower that floor."),
    ],
)
def test_the_message_names_more_accurate_precisions(precision: ComputePrecision, advice: str) -> None:
    """It is one line with model, cosine, floor and setting."""
    with pytest.raises(AccuracyError) as caught:
        check(precision, precision, 0.123456, **{precision: 0.5})
    message = caught.value.message
    assert message.startswith(f"test/small is not accurate enough at {precision}: its lowest cosine to fp32 is 0.12345")
    assert f"the floor of {precision} in EMB_PROVIDER_FIDELITY_FLOORS is 0.5" in message
    assert message.endswith(advice)
    assert "\n" not in message
    assert caught.value.reason == f"its lowest cosine to fp32 at {precision} is 0.12345, below 0.5"


def test_a_cosine_is_not_rounded_up() -> None:
    assert format_cosine(0.999996) == "0.99999"
    assert format_cosine(1.0) == "1.00000"
    assert format_cosine(0.97) == "0.97000"


# --- other outputs than dense vectors -----------------------------------------------------------------------------

OTHER_OUTPUTS: dict[str, tuple[dict[str, Any], str]] = {
    "scores": ({"scores": ScoreFidelity(500, 1.0, 0.03, 0.99)}, "the agreement of its scores"),
    "sparse": ({"sparse": SparseFidelity(500, 0.97, 0.001)}, "the agreement of its sparse vectors"),
    "multi_vector": ({"multi_vector": MultiVectorFidelity(500, 0.9, 0.03)}, "the agreement of its token vectors"),
}
"""Fidelities with an agreement of 0.97, and what messages call it."""


def check_output(output: str, requested: Precision, computed: ComputePrecision, **floors: float) -> None:
    """Check an agreement of 0.97; the floors of dense vectors are 1, so that they would fail."""
    fidelity = Fidelity(min_cosine=None, mean_cosine=None, texts=500, **OTHER_OUTPUTS[output][0])
    cosines = dict.fromkeys(FIDELITY_FLOORS, 1.0)
    spec = spec_of(precision=requested)
    check_accuracy(spec, computed, fidelity, cosines, {**AGREEMENT_FLOORS, **floors}, name="test/small")


@pytest.mark.parametrize("output", OTHER_OUTPUTS)
def test_other_outputs_have_floors_of_their_own(output: str) -> None:
    """The message names the output, its agreement, and the setting."""
    check_output(output, "int8", "int8", int8=0.97)
    with pytest.raises(AccuracyError) as caught:
        check_output(output, "int8", "bf16", int8=0.971)
    what = OTHER_OUTPUTS[output][1]
    assert f"at int8: {what} with fp32 is 0.97000 over 500 texts" in caught.value.message
    assert "the floor of int8 in EMB_PROVIDER_AGREEMENT_FLOORS is 0.971" in caught.value.message
    assert "to bf16, fp16 or fp32, or lower that floor." in caught.value.message
    assert caught.value.reason == f"{what} with fp32 at bf16 is 0.97000, below 0.971"


@pytest.mark.parametrize("output", OTHER_OUTPUTS)
def test_auto_has_its_own_floor_of_agreement(output: str) -> None:
    """Below 0.98 it falls back to fp32. At fp32 the configured floor applies."""
    with pytest.raises(AccuracyError, match=r"is 0\.97000.* is 0\.98"):
        check_output(output, "auto", "bf16", bf16=0.5)
    check_output(output, "auto", "fp32", fp32=0.5)


def test_every_output_of_a_model_is_checked() -> None:
    """As those of BGE-M3: its dense vectors are accurate enough, but not its token vectors."""
    fidelity = Fidelity(
        min_cosine=0.9999,
        mean_cosine=1.0,
        texts=500,
        sparse=SparseFidelity(500, 1.0, 0.0),
        multi_vector=MultiVectorFidelity(500, 0.9, 0.1),
    )
    with pytest.raises(AccuracyError, match="the agreement of its token vectors"):
        check_accuracy(
            spec_of(precision="bf16"), "bf16", fidelity, FIDELITY_FLOORS, AGREEMENT_FLOORS, name="test/small"
        )
