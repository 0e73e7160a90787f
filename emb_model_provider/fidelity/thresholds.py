"""Decides whether a model is accurate enough to be served, from its lowest cosine to fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emb_model_provider.errors import LoadError
from emb_model_provider.formatting import format_cosine

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emb_model_provider.backends.base import ComputePrecision, Fidelity
    from emb_model_provider.model_spec import ModelSpec, Precision

SETTING = "EMB_PROVIDER_FIDELITY_FLOORS"
AUTO_MIN_COSINE = 0.999
"""The floor of `auto`, however low the configured floors are, because its user did not trade accuracy for speed."""
_MORE_ACCURATE: Mapping[str, str] = {
    "int4": "int8, bf16, fp16 or fp32",
    "int8": "bf16, fp16 or fp32",
    "bf16": "fp16 or fp32",
    "fp16": "fp32",
}


class AccuracyError(LoadError):
    """The lowest cosine of a model to fp32 is below its floor."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
        """The measured value and the floor, for a note on the precision that is used instead."""


def check_accuracy(
    spec: ModelSpec, computed: ComputePrecision, fidelity: Fidelity | None, floors: Mapping[str, float]
) -> None:
    """Check a model's lowest cosine to fp32 against its floor. A model that was not measured passes.

    The floor is that of the requested precision, whatever the model computes in; for `auto`, it is that of the
    precision that was chosen.

    Args:
        spec: The model, with the requested precision.
        computed: The precision that the model is served at.
        fidelity: Its measured fidelity, if any.
        floors: Lowest cosine by precision.

    Raises:
        AccuracyError: It is below the floor. The message says which settings to change.
    """
    floor = _floor(spec.precision, computed, floors)
    if fidelity is None or fidelity.min_cosine >= floor:
        return
    precision = computed if spec.precision == "auto" else spec.precision
    advice = (
        f'Set EMB_PROVIDER_MODEL_PRECISION (or "precision" in the mapping) to {_MORE_ACCURATE[precision]}, or lower '
        "that floor."
        if precision in _MORE_ACCURATE
        else "Lower that floor."
    )
    cosine = format_cosine(fidelity.min_cosine)
    raise AccuracyError(
        f"{spec.name} is not accurate enough at {precision}: its lowest cosine to fp32 is {cosine} over "
        f"{fidelity.texts} texts, and the floor of {precision} in {SETTING} is {floor:g}. {advice}",
        reason=f"its lowest cosine to fp32 at {computed} is {cosine}, below {floor:g}",
    )


def _floor(requested: Precision, computed: ComputePrecision, floors: Mapping[str, float]) -> float:
    if requested != "auto":
        return floors[requested]
    return floors[computed] if computed == "fp32" else max(AUTO_MIN_COSINE, floors[computed])
