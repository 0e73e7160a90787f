"""The recipe of an artifact: everything that the artifact depends on. Equal recipes have equal artifacts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

from emb_model_provider.backends.pipeline_plan import plan_pipeline

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emb_model_provider.backends.base import ComputePrecision
    from emb_model_provider.model_spec import ModelSpec, Precision
    from emb_model_provider.snapshots.snapshot import Snapshot

FORMAT = 6
"""Increased by hand whenever the compiler makes another artifact of the same snapshot."""
_QUANTIZED_FORMAT = 2
"""The same for integer weights only. 2: matrices are rounded by GPTQ."""

RUNTIME_PACKAGES = ("openvino", "tokenizers")
"""Packages that serve an artifact. With another version of them the artifact must be compared again."""
TOOL_PACKAGES = ("torch", "transformers", "sentence-transformers")
"""Packages that make an artifact. A machine that only serves need not have them."""
QUANTIZER = "nncf"
"""The package that makes integer weights. Other artifacts do not depend on it."""

Weights = Literal["fp32", "fp16", "int8", "int4"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """An artifact to make."""

    snapshot: str
    """The digest of the snapshot."""
    plan: Mapping[str, Any]
    """See `plan_values`."""
    trust_remote_code: bool
    weights: Weights
    """The precision of the stored weights."""
    compute: tuple[ComputePrecision, ...]
    """Precisions to compute in, in the order in which they are tried. The first that is accurate enough is used."""
    versions: Mapping[str, str | None]
    """Versions of runtime and tools; None if a package is not installed here."""

    @property
    def key(self) -> str:
        """The name of the artifact: sha256 over all values, in hex."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        formats = {"format": FORMAT}
        if self.weights in ("int8", "int4"):
            formats["quantized_format"] = _QUANTIZED_FORMAT
        values: dict[str, Any] = json.loads(json.dumps({**formats, **asdict(self)}, sort_keys=True))
        return values

    def can_serve(self, other: Mapping[str, Any]) -> bool:
        """Return whether an artifact of another recipe (as JSON) can serve this one on a machine that cannot compile.

        Tools that are not installed here are not compared. An artifact that was made for a processor with fewer
        precisions, such as one in an image built elsewhere, is accurate but slower.
        """
        own = self.as_json()
        theirs = dict(other.get("versions") or {})
        for tool in (*TOOL_PACKAGES, QUANTIZER):
            if tool in own["versions"] and own["versions"][tool] is None:
                theirs[tool] = None
        compute = other.get("compute") or []
        # int8 is ignored, because every processor can compute in it, only not every one faster.
        fewer = bool(compute) and set(compute) - {"int8"} <= set(own["compute"])
        return fewer and {**other, "versions": theirs, "compute": None} == {**own, "compute": None}


def recipe_for(
    spec: ModelSpec, snapshot: Snapshot, *, trust_remote_code: bool, native_bf16: bool, fast_int8: bool = False
) -> Recipe:
    """Return the recipe of a model for a processor (see `backends.hardware`); LoadError if it has no pipeline."""
    weights, compute = _precisions(spec.precision, native_bf16=native_bf16, fast_int8=fast_int8)
    packages = [*RUNTIME_PACKAGES, *TOOL_PACKAGES]
    if weights in ("int8", "int4"):
        packages.append(QUANTIZER)
    return Recipe(
        snapshot=snapshot.digest,
        plan=plan_values(spec, snapshot, trust_remote_code=trust_remote_code),
        trust_remote_code=trust_remote_code,
        weights=weights,
        compute=compute,
        versions={name: installed_version(name) for name in packages},
    )


def plan_values(spec: ModelSpec, snapshot: Snapshot, *, trust_remote_code: bool) -> dict[str, Any]:
    """Return the pipeline plan as plain values, without the prompts of the settings.

    Those are not part of the graph: they are applied when the artifact is loaded.
    """
    return asdict(plan_pipeline(replace(spec, prompts=None), snapshot, trust_remote_code=trust_remote_code))


def installed_version(package: str) -> str | None:
    """Return the version of a package without importing it, or None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def precision_note(
    requested: Precision, computed: ComputePrecision, *, native_bf16: bool, int8_gain: float | None = None
) -> str | None:
    """Return a note on why a model computes in another precision than the requested one, or None.

    Args:
        requested: The precision of the settings.
        computed: The precision of the artifact.
        native_bf16: Whether this processor supports bf16 natively. If so, the artifact says why it is at fp32.
        int8_gain: See `Tuning`.
    """
    if requested in ("int8", "int4"):
        stored = {
            "int8": "in 8 bits",
            "int4": "in 4 bits if that costs little accuracy, above all those of the token table, and else in 8 bits",
        }
        how = f"in {computed}, about as fast as at precision auto"
        if computed == "int8":
            speed = "its speed on this processor was not measured: emb-provider tune MODEL"
            if int8_gain is not None:
                speed = f"{int8_gain:.2f} times as fast as in {'bf16' if native_bf16 else 'fp32'} on this processor"
            how = f"with activations as 8-bit integers ({speed})"
        return f"precision {requested} on a CPU: weights are stored {stored[requested]}; the model computes {how}"
    if requested == "fp16":
        return (
            f"precision fp16 on a CPU: weights are stored at half precision; the model computes in {computed}, "
            "because processors are slower at fp16 than at fp32"
        )
    if requested == "bf16" and computed != "bf16" and not native_bf16:
        return (
            f"precision bf16: this processor does not support bf16 natively, so the model computes in {computed}, "
            "which is faster here"
        )
    return None


def _precisions(
    requested: Precision, *, native_bf16: bool, fast_int8: bool
) -> tuple[Weights, tuple[ComputePrecision, ...]]:
    if requested in ("int8", "int4"):
        exact: tuple[ComputePrecision, ...] = ("bf16", "fp32") if native_bf16 else ("fp32",)
        return requested, ("int8", *exact) if fast_int8 else exact
    weights: Weights = "fp16" if requested == "fp16" else "fp32"
    if requested == "fp32" or not native_bf16:
        return weights, ("fp32",)
    # A requested bf16 that is not accurate enough is only measured, because its floor is a setting of the service.
    return weights, ("bf16",) if requested == "bf16" else ("bf16", "fp32")
