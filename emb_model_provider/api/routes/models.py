"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from fastapi import APIRouter
from starlette.exceptions import HTTPException

from emb_model_provider.api.dependencies import ServicesDep
from emb_model_provider.api.schemas.openai import ModelList, ModelObject, error_responses
from emb_model_provider.management.types import FidelityObject

if TYPE_CHECKING:
    from emb_model_provider.registry import ModelStatus


router = APIRouter(tags=["models"])


@router.get("/v1/models", summary="List the served models", responses=error_responses(401))
async def list_models(services: ServicesDep) -> ModelList:
    return ModelList(object="list", data=[_described(status) for status in services.registry.statuses()])


@router.get("/v1/models/{model:path}", summary="Describe one model", responses=error_responses(401, 404))
async def retrieve_model(services: ServicesDep, model: str) -> ModelObject:
    if not model:
        raise HTTPException(404)
    return _described(services.registry.status(model))


def _described(status: ModelStatus) -> ModelObject:
    spec, snapshot, description = status.spec, status.snapshot, status.description
    owner, slash, _ = spec.name.partition("/")
    return ModelObject(
        id=spec.alias,
        object="model",
        created=status.created,
        owned_by=owner if slash and owner else "local",
        state=status.state.value,
        error=status.error,
        name=spec.name,
        source=snapshot.hub if snapshot is not None else spec.source,
        revision=snapshot.revision if snapshot is not None else spec.revision,
        dimensions=description.dimension if description is not None else None,
        supported_dimensions=_smaller_sizes(status),
        max_input_tokens=description.max_length if description is not None else None,
        pooling=description.pooling if description is not None else None,
        normalize=description.normalize if description is not None else None,
        prompts=sorted(description.prompts) if description is not None else None,
        precision=description.precision if description is not None else None,
        device=description.device if description is not None else None,
        backend=description.backend if description is not None else None,
        notes=list(description.notes) if description is not None else None,
        memory_bytes=status.memory_bytes,
        fidelity=FidelityObject.of(description.fidelity) if description is not None else None,
    )


def _smaller_sizes(status: ModelStatus) -> list[int] | Literal["any"] | None:
    if status.description is None:
        return None
    sizes: set[int] = set()
    for group in (status.description.matryoshka, status.spec.dimensions):
        if group == "any":
            return "any"
        sizes.update(group or ())
    return sorted(sizes)
