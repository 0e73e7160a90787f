"""`/v1/models`: the served models, in OpenAI's form."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from fastapi import APIRouter
from starlette.exceptions import HTTPException

from emb_model_provider.api.dependencies import ServicesDep
from emb_model_provider.api.schemas.openai import ModelList, ModelObject, OutputTypes, TuningObject, error_responses
from emb_model_provider.backends.output_types import range_of
from emb_model_provider.management.types import FidelityObject
from emb_model_provider.serving.request_options import has_search_prompts

if TYPE_CHECKING:
    from emb_model_provider.backends.base import ModelDescription
    from emb_model_provider.registry import ModelStatus

_DESCRIBED_FIELDS = (
    "kind", "tasks", "dimensions", "max_input_tokens", "precision", "device", "backend", "notes", "fidelity",
)  # fmt: skip
"""Fields that are None until the model is loaded."""

router = APIRouter(tags=["models"])


@router.get(
    "/v1/models",
    summary="List the served models",
    description="Also those on disk, if the service loads them at their first request (EMB_PROVIDER_SERVE_CACHED).",
    responses=error_responses(401, 403),
)
async def list_models(services: ServicesDep) -> ModelList:
    statuses = await services.models.statuses()
    return ModelList(
        object="list", data=[_model_object(status, alias) for status in statuses for alias in status.spec.aliases]
    )


@router.get("/v1/models/{model:path}", summary="Describe a served model", responses=error_responses(401, 403, 404))
async def retrieve_model(services: ServicesDep, model: str) -> ModelObject:
    if not model:
        raise HTTPException(404)
    status, resolved = await services.models.status(model)
    description = status.description
    if resolved.needs_prompts and description is not None and not has_search_prompts(description):
        raise services.registry.not_found(model)
    return _model_object(status, resolved.listed)


def common_fields(status: ModelStatus) -> dict[str, Any]:
    """Return the fields that `ModelObject` and `ServedModel` share."""
    spec, snapshot, description = status.spec, status.snapshot, status.description
    fields: dict[str, Any] = {
        "source": snapshot.hub if snapshot is not None else spec.source,
        "revision": snapshot.revision if snapshot is not None else spec.revision,
        "state": status.state.value,
        "error": status.error,
        "memory_bytes": status.memory_bytes,
    }
    if description is None:
        return fields | dict.fromkeys(_DESCRIBED_FIELDS)
    return fields | {
        "kind": description.kind,
        "tasks": list(description.tasks),
        "dimensions": description.dimension if "scores" not in description.outputs else None,
        "max_input_tokens": description.max_length,
        "precision": description.precision,
        "device": description.device,
        "backend": description.backend,
        "notes": list(description.notes),
        "fidelity": FidelityObject.of(description.fidelity),
    }


def _model_object(status: ModelStatus, alias: str) -> ModelObject:
    spec, description = status.spec, status.description
    owner, slash, _ = spec.name.partition("/")
    return ModelObject(
        id=alias,
        object="model",
        created=status.created,
        owned_by=owner if slash and owner else "local",
        name=spec.name,
        model_type="rerank" if status.tasks == ("rerank",) else "embedding",
        model_name=spec.name,
        max_tokens=description.max_length if description is not None else None,
        input_type=spec.defaults_of(alias).input_type,
        labels=list(description.labels) if description is not None and description.kind == "classifier" else None,
        supported_dimensions=_supported_dimensions(status),
        pooling=description.pooling if description is not None else None,
        normalize=description.normalize if description is not None else None,
        prompts=sorted({*description.prompts, *description.routes}) if description is not None else None,
        tuning=_tuning(description),
        output_types=_output_types(description) if description is not None else None,
        **common_fields(status),
    )


def _tuning(description: ModelDescription | None) -> TuningObject | None:
    if description is None or description.backend != "openvino":
        return None
    return TuningObject(activation_group=description.activation_group, **asdict(description.tuning))


def _output_types(description: ModelDescription) -> OutputTypes | None:
    calibration = description.calibration
    if calibration is None:
        return None
    normalized, size = description.normalize, description.dimension
    return OutputTypes(
        int8_range=range_of(calibration, size, normalized=normalized),
        int8_range_normalized=range_of(calibration, size, normalized=True),
        top10_overlap=dict(calibration.top10_overlap),
    )


def _supported_dimensions(status: ModelStatus) -> list[int] | Literal["any"] | None:
    if status.description is None:
        return None
    sizes: set[int] = set()
    for group in (status.description.matryoshka, status.spec.dimensions):
        if group == "any":
            return "any"
        sizes.update(group or ())
    return sorted(sizes)
