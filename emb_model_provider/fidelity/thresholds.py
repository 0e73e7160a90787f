"""Is a model true enough to be served? Its lowest cosine to fp32, against the floor of its precision."""

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
"""`auto` chooses nothing below this, whatever the floors allow: nobody asked it to be less true for speed."""
_MORE_ACCURATE: Mapping[str, str] = {
    "int4": "int8, bf16, fp16 or fp32",
    "int8": "bf16, fp16 or fp32",
    "bf16": "fp16 or fp32",
    "fp16": "fp32",
}
"""What to choose in place of a precision that is refused."""


class AccuracyError(LoadError):
    """A model's vectors are further from fp32 than is allowed."""

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason
        """How far, in a few words, for a note on what was chosen instead."""


def check_accuracy(
    spec: ModelSpec, computed: ComputePrecision, fidelity: Fidelity | None, floors: Mapping[str, float]
) -> None:
    """Let a model pass whose lowest cosine reaches its floor, or was not measured.

    The floor is that of the precision that was asked for, however the model computes it; for `auto`, of the one
    it became.

    Raises: UntrueModelError, whose one line says what to do.
    """
    floor = _floor(spec.precision, computed, floors)
    if fidelity is None or fidelity.min_cosine >= floor:
        return
    precision = computed if spec.precision == "auto" else spec.precision
    advice = (
        f'Set EMB_PROVIDER_MODEL_PRECISION (or the mapping\'s "precision") to {_MORE_ACCURATE[precision]}, or lower that floor.'
        if precision in _MORE_ACCURATE
        else "Lower that floor."
    )
    found = format_cosine(fidelity.min_cosine)
    raise AccuracyError(
        f"{spec.name} is not true enough at {precision}: its lowest cosine to fp32 is {found} over {fidelity.texts} "
        f"texts, and the floor of {precision} in {SETTING} is {floor:g}. {advice}",
        reason=f"its lowest cosine to fp32 at {computed} is {found}, below {floor:g}",
    )


def _floor(asked: Precision, computed: ComputePrecision, floors: Mapping[str, float]) -> float:
    if asked != "auto":
        return floors[asked]
    return floors[computed] if computed == "fp32" else max(AUTO_MIN_COSINE, floors[computed])
