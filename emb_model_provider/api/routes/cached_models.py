"""`/api/models/cache`: models on disk are listed, described, verified and removed."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query
from starlette.exceptions import HTTPException
from starlette.requests import Request

from emb_model_provider.api.cache_removal import CacheRemoval, models_using
from emb_model_provider.api.dependencies import Services, ServicesDep
from emb_model_provider.api.middleware import cancelled_on_disconnect
from emb_model_provider.api.parameters import documented, from_query_or_body
from emb_model_provider.api.schemas import management as schemas
from emb_model_provider.api.schemas.openai import error_responses
from emb_model_provider.errors import NotCachedError
from emb_model_provider.progress import CancelToken

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emb_model_provider.management.types import CachedModelRecord
    from emb_model_provider.registry import ModelStatus

CACHE = "/api/models/cache"

_MAX_ID_LENGTH = 500
_RESERVED_IDS = {"list": "GET", "all": "DELETE"}
"""Path segments that are not ids, with the only method that each of them accepts."""

router = APIRouter(tags=["management"])


@router.get(f"{CACHE}/list", summary="List the models on disk", responses=error_responses(400, 401, 403))
async def list_cached(services: ServicesDep, query: Annotated[schemas.ListQuery, Query()]) -> schemas.CachedModels:
    models = await services.in_disk_thread(partial(services.manager.list, everything=query.all))
    statuses = services.registry.statuses()
    total_size = await services.in_disk_thread(partial(services.manager.total_size, models))
    return schemas.CachedModels(models=[_with_aliases(model, statuses) for model in models], total_size=total_size)


@router.delete(
    f"{CACHE}/all",
    summary="Remove all models from disk",
    description="Models that are in use, or outside the cache directories of the settings, are kept and listed. Directories, "
    "and models that other programs downloaded, are not changed.",
    responses=error_responses(400, 401, 403, 500, 503),
    openapi_extra=documented(schemas.RemoveAllQuery),
)
async def remove_all(
    services: ServicesDep,
    request: Request,
    query: Annotated[schemas.RemoveAllQuery, from_query_or_body(schemas.RemoveAllQuery)],
) -> schemas.Removed:
    models = await services.in_disk_thread(services.manager.list)
    return await _remove(CacheRemoval(services, request, query, models, services.manager.remove_all))


@router.get(
    f"{CACHE}/{{model_id:path}}",
    summary="Describe a model on disk",
    description="By its id, or by its name with slashes or `%2F`. Returns each revision of it from each hub.",
    responses=error_responses(400, 401, 403, 404),
)
async def look(
    services: ServicesDep, model_id: str, query: Annotated[schemas.CachedQuery, Query()]
) -> schemas.CachedModelsDetails:
    models = await _find(services, model_id, query)
    statuses = services.registry.statuses()
    details = []
    for model in models:
        inspected = await services.in_disk_thread(partial(services.manager.inspect, model))
        details.append(schemas.CachedModelDetails(**dict(_with_aliases(model, statuses)), details=inspected))
    return schemas.CachedModelsDetails(models=details)


@router.post(
    f"{CACHE}/{{model_id:path}}/verify",
    summary="Hash all files of a model again, and compare them with the recorded hashes",
    responses=error_responses(400, 401, 403, 404, 503),
    openapi_extra=documented(schemas.CachedQuery),
)
async def verify(
    services: ServicesDep,
    request: Request,
    model_id: str,
    query: Annotated[schemas.CachedQuery, from_query_or_body(schemas.CachedQuery)],
) -> schemas.VerifiedModels:
    models = await _find(services, model_id, query)
    cancel = CancelToken()
    verify_model = partial(
        services.manager.verify, on_progress=lambda _: services.background.raise_if_shutting_down(), cancel=cancel
    )
    await request.body()
    async with cancelled_on_disconnect(request):
        try:
            results = [await services.in_verify_thread(partial(verify_model, model)) for model in models]
        finally:
            cancel.cancel()  # so that the thread stops after the file that it is hashing
    statuses = services.registry.statuses()
    return schemas.VerifiedModels(
        ok=all(result.ok for result in results),
        models=[schemas.VerifiedModel(**dict(each), served_as=_aliases(each, statuses)) for each in results],
    )


@router.delete(
    f"{CACHE}/{{model_id:path}}",
    summary="Remove a model from disk",
    description="Removes all revisions of it from all hubs, unless the query names one, and everything compiled from "
    "them. A model in use is never removed.",
    responses=error_responses(400, 401, 403, 404, 409, 500, 503),
    openapi_extra=documented(schemas.RemoveQuery),
)
async def remove(
    services: ServicesDep,
    request: Request,
    model_id: str,
    query: Annotated[schemas.RemoveQuery, from_query_or_body(schemas.RemoveQuery)],
) -> schemas.Removed:
    models = await _find(services, model_id, query, removing=True)
    remove_models = partial(services.manager.remove, model_id, source=query.source, revision=query.revision)
    return await _remove(CacheRemoval(services, request, query, models, remove_models))


async def _find(
    services: Services, model_id: str, query: schemas.CachedQuery, *, removing: bool = False
) -> list[CachedModelRecord]:
    if model_id in _RESERVED_IDS:
        raise HTTPException(405, headers={"allow": _RESERVED_IDS[model_id]})
    if len(model_id) > _MAX_ID_LENGTH:
        raise NotCachedError("The name is too long. GET /api/models/cache/list lists the models on disk.")
    return await services.in_disk_thread(
        partial(services.manager.find, model_id, source=query.source, revision=query.revision, removing=removing)
    )


def _with_aliases(model: CachedModelRecord, statuses: Sequence[ModelStatus]) -> schemas.CachedModel:
    return schemas.CachedModel(**dict(model), served_as=_aliases(model, statuses))


def _aliases(model: CachedModelRecord, statuses: Sequence[ModelStatus]) -> list[str]:
    return [status.spec.alias for status in models_using([model], statuses)]


async def _remove(cache_removal: CacheRemoval) -> schemas.Removed:
    before = cache_removal.services.registry.statuses()
    removal, unloaded = await cache_removal.run()
    return schemas.Removed(
        dry_run=cache_removal.query.dry_run,
        models=[_with_aliases(model, before) for model in removal.models],
        artifacts=removal.artifacts,
        freed=removal.freed,
        kept=[schemas.KeptModel(**dict(model), served_as=_aliases(model, before)) for model in removal.kept],
        unloaded=unloaded,
    )
