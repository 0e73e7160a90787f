"""All that an artifact depends on: the same recipe, the same artifact.

Imports no runtime: versions are read from the installed packages' metadata.
"""

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

FORMAT = 2
"""Raised by hand whenever the compile step makes something else of the same snapshot."""

RUNTIME_PACKAGES = ("openvino", "tokenizers")
"""What serves an artifact: another version of it has to verify anew."""
TOOL_PACKAGES = ("torch", "transformers", "sentence-transformers")
"""What makes an artifact; a machine that only serves need not have them."""
QUANTIZER = "nncf"
"""The same for an artifact whose weights are integers; no other depends on it."""

Weights = Literal["fp32", "fp16", "int8", "int4"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What the compile step is to make."""

    snapshot: str
    """The snapshot's digest."""
    plan: Mapping[str, Any]
    """The pipeline plan as plain values, without the directory and without the operator's own prompts: those
    do not shape the graph, and are applied when the artifact is loaded."""
    trust_remote_code: bool
    weights: Weights
    """How weights are stored."""
    compute: tuple[ComputePrecision, ...]
    """Precisions to compute in, in the order in which they are tried: the first that is true enough is used."""
    versions: Mapping[str, str | None]
    """Of runtime and tools; None where a package is not installed here."""

    @property
    def key(self) -> str:
        """The artifact's name: sha256 over everything here, in hex."""
        return hashlib.sha256(json.dumps(self.as_json(), sort_keys=True).encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values, which are equal for equal recipes."""
        values: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **asdict(self)}, sort_keys=True))
        return values

    def can_serve(self, other: Mapping[str, Any]) -> bool:
        """Whether an artifact of `other` (as JSON) serves this recipe where nothing can be compiled.

        Tools that are not installed here cannot have changed, and an artifact from a processor that has fewer
        precisions (an image that was built elsewhere) is right, if slower.
        """
        own = self.as_json()
        theirs = dict(other.get("versions") or {})
        for tool in (*TOOL_PACKAGES, QUANTIZER):
            if tool in own["versions"] and own["versions"][tool] is None:
                theirs[tool] = None
        compute = other.get("compute") or []
        # Where a processor is no faster at integers, activations are rounded to them all the same, or stay as they are.
        fewer = bool(compute) and set(compute) - {"int8"} <= set(own["compute"])
        return fewer and {**other, "versions": theirs, "compute": None} == {**own, "compute": None}


def recipe_for(
    spec: ModelSpec,
    snapshot: Snapshot,
    *,
    trust_remote_code: bool,
    native_bf16: bool,
    fast_int8: bool = False,
) -> Recipe:
    """Return what to compile for a model on a processor with or without bf16 and fast integers of its own.

    Raises: UnsupportedModelError or LoadError where the snapshot's files do not make a pipeline.
    """
    weights, compute = _precisions(spec.precision, native_bf16=native_bf16, fast_int8=fast_int8)
    plan = plan_pipeline(replace(spec, prompts=None), snapshot, trust_remote_code=trust_remote_code)
    values = asdict(plan)
    del values["directory"]
    packages: tuple[str, ...] = (*RUNTIME_PACKAGES, *TOOL_PACKAGES)
    if weights in ("int8", "int4"):
        packages = (*packages, QUANTIZER)
    return Recipe(
        snapshot=snapshot.digest,
        plan=values,
        trust_remote_code=trust_remote_code,
        weights=weights,
        compute=compute,
        versions={name: installed_version(name) for name in packages},
    )


def installed_version(package: str) -> str | None:
    """Return a package's version without importing it; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def precision_note(requested: Precision, computed: ComputePrecision) -> str | None:
    """Say, for people, why a model computes in another precision than the one that was asked for.

    `computed` is the description's `compute`, or its `precision` where that is None.
    """
    if requested in ("int8", "int4"):
        stored = {
            "int8": "in 8 bits",
            "int4": "in 4 bits where that costs least, above all those of the tokens, and in 8 bits elsewhere",
        }
        how = "with activations as 8-bit integers" if computed == "int8" else f"in {computed}"
        return f"precision {requested} on a CPU: weights are stored {stored[requested]}, and computed {how}"
    if requested == "fp16":
        return (
            f"precision fp16 on a CPU: weights are stored at half precision and computed in {computed}, since "
            "processors are slower at fp16 than at fp32"
        )
    if requested == "bf16" and computed != "bf16":
        return f"precision bf16: this processor has no bf16 of its own, so it computes in {computed}, which is faster here"
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
    # An explicit bf16 that does not verify is refused; auto and fp16 leave the choice to us.
    return weights, ("bf16",) if requested == "bf16" else ("bf16", "fp32")
