"""/api/models/cache: models on disk, listed, looked at, checked and removed."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import APIRouter, Query
from starlette.exceptions import HTTPException
from starlette.requests import Request  # noqa: TC002 - FastAPI reads it

from emb_model_provider.api.background_tasks import GoingOn
from emb_model_provider.api.cache_removal import Remover, loaded_from
from emb_model_provider.api.middleware import ClientGoneError, cancelled_on_disconnect
from emb_model_provider.api.schemas.management import (
    CachedArtifact,
    CachedModel,
    CachedModelDetails,
    CachedModels,
    CachedModelsDetails,
    CachedQuery,
    Details,
    Finding,
    KeptModel,
    ListQuery,
    RemoveAllQuery,
    Removed,
    RemoveQuery,
    VerifiedModel,
    VerifiedModels,
    fidelity_object,
)
from emb_model_provider.api.schemas.openai import error_responses
from emb_model_provider.errors import NotCachedError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from emb_model_provider.hubs.base import Progress
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.management.types import CachedSnapshot, Removal, Verification
    from emb_model_provider.registry import ModelStatus, Registry

CACHE = "/api/models/cache"

T = TypeVar("T")

_THREADS = 4
_VERIFYING_THREADS = 2
"""Of their own, both: reading gigabytes to check them must take neither the threads that requests for embeddings use, nor
those that list and remove models."""
_LONGEST_ID = 500
_NOT_IDS = {"list": "GET", "all": "DELETE"}
"""What stands where an id would, with the only method that it is for."""


def router(manager: ModelManager, registry: Registry, is_stopping: Callable[[], bool]) -> APIRouter:
    routes = APIRouter(tags=["management"])
    going_on = GoingOn(is_stopping)
    threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="cache")
    verifying = ThreadPoolExecutor(_VERIFYING_THREADS, thread_name_prefix="verify")

    async def on_disk(work: Callable[[], T], pool: ThreadPoolExecutor = threads) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    async def found(model_id: str, query: CachedQuery) -> list[CachedSnapshot]:
        if model_id in _NOT_IDS:
            raise HTTPException(405, headers={"allow": _NOT_IDS[model_id]})
        if len(model_id) > _LONGEST_ID:
            raise NotCachedError(
                "No model has so long a name. GET /api/models/cache/list lists those there are."
            )
        return await on_disk(partial(manager.find, model_id, source=query.source, revision=query.revision))

    remover = Remover(registry, on_disk, going_on)

    @routes.get(f"{CACHE}/list", summary="List the models on disk", responses=error_responses(400, 401, 403))
    async def list_cached(query: Annotated[ListQuery, Query()]) -> CachedModels:
        snapshots = await on_disk(partial(manager.list, everything=query.all))
        statuses = registry.statuses()
        return CachedModels(
            models=[CachedModel(**_fields(snapshot, statuses)) for snapshot in snapshots],
            total_size=_total_size(snapshots),
        )

    @routes.delete(
        f"{CACHE}/all",
        summary="Remove all models from disk",
        description="What is in use is kept, and named. What other programs put into the hubs' caches is not touched, nor "
        "are directories.",
        responses=error_responses(400, 401, 403, 500, 503),
    )
    async def remove_all(request: Request, query: Annotated[RemoveAllQuery, Query()]) -> Removed:
        snapshots = await on_disk(manager.list)
        before = registry.statuses()
        removal, unloaded = await remover.remove_all(request, manager, snapshots, query)
        return _removed(removal, unloaded, before, dry_run=query.dry_run)

    @routes.get(
        f"{CACHE}/{{model_id:path}}",
        summary="Look at a model on disk",
        description="By its id or its name, slashes as they are or as `%2F`: each revision of it, from each hub.",
        responses=error_responses(400, 401, 403, 404),
    )
    async def look(model_id: str, query: Annotated[CachedQuery, Query()]) -> CachedModelsDetails:
        snapshots = await found(model_id, query)
        details = [await on_disk(partial(manager.inspect, snapshot)) for snapshot in snapshots]
        statuses = registry.statuses()
        return CachedModelsDetails(
            models=[
                CachedModelDetails(**_fields(snapshot, statuses), details=Details.model_validate(each))
                for snapshot, each in zip(snapshots, details, strict=True)
            ]
        )

    @routes.post(
        f"{CACHE}/{{model_id:path}}/verify",
        summary="Read all of a model's files again, and compare",
        responses=error_responses(400, 401, 403, 404, 503),
    )
    async def verify(
        request: Request, model_id: str, query: Annotated[CachedQuery, Query()]
    ) -> VerifiedModels:
        snapshots = await found(model_id, query)
        is_wanted = True

        def after_each_file(_: Progress) -> None:
            going_on.require_time()
            if not is_wanted:
                raise ClientGoneError

        await request.body()
        async with cancelled_on_disconnect(request):
            try:
                results = [
                    await on_disk(partial(manager.verify, snapshot, on_progress=after_each_file), verifying)
                    for snapshot in snapshots
                ]
            finally:
                is_wanted = False
        statuses = registry.statuses()
        return VerifiedModels(
            ok=all(result.ok for result in results),
            models=[_verified(result, statuses) for result in results],
        )

    @routes.delete(
        f"{CACHE}/{{model_id:path}}",
        summary="Remove a model from disk",
        description="All revisions of it, from all hubs, unless the query narrows it, and what was compiled from them. "
        "A model in use is never removed.",
        responses=error_responses(400, 401, 403, 404, 409, 500, 503),
    )
    async def remove(request: Request, model_id: str, query: Annotated[RemoveQuery, Query()]) -> Removed:
        snapshots = await found(model_id, query)
        before = registry.statuses()
        removal, unloaded = await remover.remove(request, manager, model_id, snapshots, query)
        return _removed(removal, unloaded, before, dry_run=query.dry_run)

    return routes


def _fields(snapshot: CachedSnapshot, statuses: Sequence[ModelStatus]) -> dict[str, Any]:
    return {
        "id": snapshot.id,
        "model_name": snapshot.name,
        "source": snapshot.hub,
        "asked_revision": snapshot.asked_revision,
        "revision": snapshot.revision,
        "path": str(snapshot.path) if snapshot.path is not None else None,
        "state": snapshot.state,
        "size": snapshot.size + sum(artifact.size for artifact in snapshot.artifacts),
        "files_size": snapshot.size,
        "artifacts": [
            CachedArtifact(
                key=artifact.key,
                precision=artifact.precision,
                computed=artifact.computed,
                size=artifact.size,
                last_used=artifact.last_used,
                fidelity=fidelity_object(artifact.fidelity),
                in_use=artifact.in_use,
            )
            for artifact in snapshot.artifacts
        ],
        "fetched": snapshot.fetched,
        "last_used": snapshot.last_used,
        "in_use": snapshot.in_use,
        "served_as": [status.spec.alias for status in loaded_from([snapshot], statuses)],
    }


def _total_size(snapshots: Sequence[CachedSnapshot]) -> int:
    files = {snapshot.path: snapshot.size for snapshot in snapshots if snapshot.path is not None}
    artifacts = {artifact.key: artifact.size for snapshot in snapshots for artifact in snapshot.artifacts}
    return sum(files.values()) + sum(artifacts.values())


def _verified(result: Verification, statuses: Sequence[ModelStatus]) -> VerifiedModel:
    return VerifiedModel(
        **_fields(result.snapshot, statuses),
        ok=result.ok,
        findings=[Finding(path=finding.path, problem=finding.problem) for finding in result.findings],
        damaged_artifacts=list(result.damaged_artifacts),
    )


def _removed(
    removal: Removal, unloaded: list[str], before: Sequence[ModelStatus], *, dry_run: bool
) -> Removed:
    return Removed(
        dry_run=dry_run,
        models=[CachedModel(**_fields(snapshot, before)) for snapshot in removal.snapshots],
        artifacts=list(removal.artifacts),
        freed=removal.freed,
        kept=[KeptModel(**_fields(snapshot, before), reason=reason) for snapshot, reason in removal.kept],
        unloaded=unloaded,
    )
