"""`/api/models`, `/api/models/load` and `/api/models/unload`: the served models, and which of them are in memory."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated

import psutil
from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from emb_model_provider.api.dependencies import ServicesDep
from emb_model_provider.api.parameters import documented, from_query_or_body
from emb_model_provider.api.routes.models import common_fields
from emb_model_provider.api.schemas.management import LoadQuery, Process, ServedModel, ServedModels, UnloadQuery
from emb_model_provider.api.schemas.openai import error_responses
from emb_model_provider.errors import AliasInUseError, DirectoryNotAllowedError, ModelNotFoundError, RequestError
from emb_model_provider.formatting import quote
from emb_model_provider.management.kept_models import KeptModel
from emb_model_provider.model_resolver import resolve_model, resolve_source

if TYPE_CHECKING:
    from emb_model_provider.api.schemas.management import ModelQuery
    from emb_model_provider.management.kept_models import KeptModels
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.registry import ModelStatus, Registry
    from emb_model_provider.settings import Settings

router = APIRouter(tags=["management"])


@router.get("/api/models", summary="List the served models and their memory", responses=error_responses(401, 403))
async def list_served(services: ServicesDep) -> ServedModels:
    statuses = services.registry.statuses()
    memory = services.settings.memory
    return ServedModels(
        models=[_served_model(status, services.kept) for status in statuses],
        process=Process(
            pid=os.getpid(),
            version=version("emb-model-provider"),
            resident_bytes=psutil.Process().memory_info().rss,
            models_memory_bytes=sum(status.memory_bytes or 0 for status in statuses),
            memory_limit_bytes=memory.model_memory_limit,
            max_loaded_models=memory.max_loaded_models,
        ),
    )


@router.post(
    "/api/models/load",
    summary="Load a model",
    description="A model that is not in the settings is served from now on, until it is forgotten or the service stops; "
    "with `keep` also after a restart. "
    "If it cannot be loaded, it is forgotten at once, unless `wait=false`.",
    response_model=ServedModel,
    responses={
        202: {"model": ServedModel, "description": "With `wait=false`: the model is being loaded."},
        **error_responses(400, 401, 403, 404, 409, 500, 502, 503),
    },
    openapi_extra=documented(LoadQuery),
)
async def load(services: ServicesDep, query: Annotated[LoadQuery, from_query_or_body(LoadQuery)]) -> Response:
    registry = services.registry
    alias = _served_alias(registry, query)
    is_new = alias is None
    if alias is None:
        # On a thread, because it checks whether the name is a directory.
        spec = await asyncio.to_thread(resolve_requested_model, services.settings, query, query.alias)
        present: ModelStatus | None = None
        with suppress(ModelNotFoundError):
            present = registry.status(spec.alias)
        if present is not None and not _is_same_model(present.spec, spec):
            raise AliasInUseError(_alias_in_use_message(spec.alias, present))
        is_new = present is None
        alias = registry.add(spec) if present is None else spec.alias

    async def load_and_keep() -> ModelStatus:
        status = await registry.load(alias)
        if query.keep and not status.configured:
            await services.in_disk_thread(partial(services.kept.add, _kept_model(status.spec)))
        return status

    if not query.wait:
        services.background.start(load_and_keep())
        await asyncio.sleep(0)  # lets the task set the state that the response shows
        return _response(registry.status(alias), 202, services.kept)

    async def load_or_remove() -> ModelStatus:
        try:
            return await load_and_keep()
        except Exception:
            if is_new and not services.background.is_shutting_down():
                with suppress(ModelNotFoundError):  # it was removed meanwhile
                    await registry.remove(alias)
            raise

    return _response(await services.background.wait(load_or_remove()), 200, services.kept)


@router.post(
    "/api/models/unload",
    summary="Unload a model",
    description="Current requests are answered first. The next request for the model loads it again.",
    responses=error_responses(400, 401, 403, 404, 503),
    openapi_extra=documented(UnloadQuery),
)
async def unload(services: ServicesDep, query: Annotated[UnloadQuery, from_query_or_body(UnloadQuery)]) -> ServedModel:
    alias = services.registry.alias_of(query.model_name)
    if not query.forget:
        return _served_model(await services.background.wait(services.registry.unload(alias)), services.kept)
    status = await services.background.wait(services.registry.remove(alias))
    await services.in_disk_thread(partial(services.kept.remove, alias))
    return _served_model(status, services.kept)


def resolve_requested_model(settings: Settings, query: ModelQuery, alias: str | None = None) -> ModelSpec:
    """Return the model that a query names.

    Only the settings can name directories, because otherwise a client could make the service read any directory of its
    machine. Code of a repository is never run if the settings do not name the repository, even if they trust its hub,
    because a client that may manage models may not run programs.
    """
    name = query.model_name
    for param, value in (("model_name", name), ("alias", alias)):
        if value is not None and (not value.isprintable() or value != value.strip() or not value):
            raise RequestError(
                f"Invalid value for '{param}' = {quote(value)}. Use printable text without surrounding spaces.",
                param=param,
            )
    try:
        spec = resolve_model(
            settings, name, alias=alias, source=query.source, revision=query.revision, precision=query.precision
        )
        is_directory = resolve_source(spec) == "local"
    except (OSError, RuntimeError, ValueError):  # the operating system rejects the name as a path
        raise RequestError(
            f"Invalid value for 'model_name' = {quote(name)}. Use an alias, or the id of a repository (owner/name).",
            param="model_name",
        ) from None
    if _files_key(spec) in map(_files_key, settings.models.specs()):
        return spec
    if is_directory:
        raise DirectoryNotAllowedError(
            f"{quote(name)} is a directory of this machine, which a request cannot name. The operator can add it to "
            "EMB_PROVIDER_MODEL_MAPPING, or load it with `emb-provider` on this machine. If you mean a repository, name "
            "its hub: `source` (`--source` on the command line) huggingface or modelscope."
        )
    return replace(spec, trust_remote_code=False)


def _served_alias(registry: Registry, query: LoadQuery) -> str | None:
    """Return the alias of the served model that a query names, or None if it is new or the query has more conditions."""
    if query.alias or query.source or query.revision or query.precision:
        return None
    with suppress(ModelNotFoundError):
        return registry.alias_of(query.model_name)
    return None


def _alias_in_use_message(name: str, present: ModelStatus) -> str:
    spec = present.spec
    model = f"{spec.name} (source {spec.source}, revision {spec.revision or 'default'}, precision {spec.precision})"
    served = "" if name == spec.alias else f", served as `{spec.alias}`"
    remedy = "Choose another `alias` for the new model (`--alias` on the command line)"
    if not present.configured:
        remedy += (
            f", or remove this one: `emb-provider unload --forget {spec.alias}`, or POST "
            f"/api/models/unload?model_name={spec.alias}&forget=true"
        )
    return f"`{name}` means {model}{served}. {remedy}."


def _is_same_model(left: ModelSpec, right: ModelSpec) -> bool:
    """Return whether two specs load one model in the same way. `auto` is the same as the hub that it resolves to."""
    return resolve_source(left) == resolve_source(right) and replace(left, source=right.source) == right


def _files_key(spec: ModelSpec) -> tuple[object, ...]:
    """Return what determines the files of a model."""
    return resolve_source(spec), spec.name, spec.path, spec.endpoint, spec.revision


def _kept_model(spec: ModelSpec) -> KeptModel:
    return KeptModel(
        alias=spec.alias, model_name=spec.name, source=spec.source, revision=spec.revision, precision=spec.precision
    )


def _response(status: ModelStatus, code: int, kept: KeptModels) -> Response:
    return JSONResponse(_served_model(status, kept).model_dump(mode="json"), code)


def _served_model(status: ModelStatus, kept: KeptModels) -> ServedModel:
    spec = status.spec
    return ServedModel(
        alias=spec.alias,
        more_aliases=list(spec.more_aliases),
        model_name=spec.name,
        path=str(status.snapshot.path) if status.snapshot is not None else None,
        configured=status.configured,
        kept=spec.alias in kept.aliases,
        preload=status.preload,
        progress=status.progress_text,
        unloaded_because=status.unload_reason,
        loaded_at=_time(status.loaded_at),
        last_used=_time(status.last_used),
        requests_served=status.requests_served,
        requests_per_s=status.requests_per_s,
        p95_s=status.p95_s,
        waiting_inputs=status.waiting_inputs,
        waiting_tokens=status.waiting_tokens,
        restarts=status.restarts,
        asked_precision=spec.precision,
        **common_fields(status),
    )


def _time(unix_s: float | None) -> datetime | None:
    return datetime.fromtimestamp(unix_s, UTC) if unix_s is not None else None
