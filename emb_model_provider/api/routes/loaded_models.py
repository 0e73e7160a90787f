"""GET /api/models, POST /api/models/load and /api/models/unload: which models are in memory."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated

import psutil
from fastapi import APIRouter, Query
from starlette.responses import JSONResponse, Response

from emb_model_provider.api.dependencies import ServicesDep
from emb_model_provider.api.schemas.management import (
    LoadQuery,
    Process,
    ServedModel,
    ServedModels,
    UnloadQuery,
)
from emb_model_provider.api.schemas.openai import error_responses
from emb_model_provider.errors import AliasInUseError, ModelNotFoundError, NotAllowedError, RequestError
from emb_model_provider.management.types import FidelityObject
from emb_model_provider.model_resolver import resolve_model, resolve_source

if TYPE_CHECKING:
    from emb_model_provider.api.schemas.management import ModelQuery
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.registry import ModelStatus, Registry
    from emb_model_provider.settings import Settings


router = APIRouter(tags=["management"])


@router.get(
    "/api/models",
    summary="List the served models and their memory",
    responses=error_responses(401, 403),
)
async def list_served(services: ServicesDep) -> ServedModels:
    statuses = services.registry.statuses()
    memory = services.settings.memory
    return ServedModels(
        models=[_served(status) for status in statuses],
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
    description="A model that is not in the settings is served from now on, until it is forgotten or the service stops. "
    "It is forgotten at once if it cannot be loaded, unless `wait=false`.",
    response_model=ServedModel,
    responses={
        202: {"model": ServedModel, "description": "With `wait=false`: it is being loaded."},
        **error_responses(400, 401, 403, 404, 409, 500, 502, 503),
    },
)
async def load(services: ServicesDep, query: Annotated[LoadQuery, Query()]) -> Response:
    registry = services.registry
    alias = _known(registry, query)
    is_new = alias is None
    if alias is None:
        # On a thread, because it looks for directories of that name.
        spec = await asyncio.to_thread(resolve_requested_model, services.settings, query, query.alias)
        present = _status_of(registry, spec.alias)
        if present is not None and not is_same(present.spec, spec):
            raise AliasInUseError(_alias_in_use(spec.alias, present))
        is_new = present is None
        alias = registry.add(spec) if present is None else spec.alias
    if not query.wait:
        services.background.start(registry.load(alias))
        await asyncio.sleep(0)  # so that its state is that of a model being loaded
        return _response(registry.status(alias), 202)

    async def load_or_remove() -> ModelStatus:
        try:
            return await registry.load(alias)
        except Exception:
            if is_new and not services.background.is_shutting_down():
                with suppress(ModelNotFoundError):  # it was removed meanwhile
                    await registry.remove(alias)
            raise

    return _response(await services.background.wait(load_or_remove()), 200)


@router.post(
    "/api/models/unload",
    summary="Unload a model",
    description="Its requests are answered first. The next request for it loads it again.",
    responses=error_responses(400, 401, 403, 404, 503),
)
async def unload(services: ServicesDep, query: Annotated[UnloadQuery, Query()]) -> ServedModel:
    alias = services.registry.alias_of(query.model_name)
    unload_model = services.registry.remove if query.forget else services.registry.unload
    return _served(await services.background.wait(unload_model(alias)))


def _known(registry: Registry, query: LoadQuery) -> str | None:
    """Return the alias of the served model that a query names and nothing more; None where it says how to load it."""
    if query.alias or query.source or query.revision or query.precision:
        return None
    try:
        return registry.alias_of(query.model_name)
    except ModelNotFoundError:
        return None


def _status_of(registry: Registry, name: str) -> ModelStatus | None:
    """Return the served model that requests mean by a name, if there is one."""
    try:
        return registry.status(name)
    except ModelNotFoundError:
        return None


def _alias_in_use(name: str, present: ModelStatus) -> str:
    spec = present.spec
    how = f"{spec.name} (source {spec.source}, revision {spec.revision or 'default'}, precision {spec.precision})"
    served = "" if name == spec.alias else f", served as `{spec.alias}`"
    ways = "give the other one a name of its own: &alias=…"
    if not present.configured:
        ways += f", or end this one: POST /api/models/unload?model_name={spec.alias}&forget=true"
    return f"`{name}` means {how}{served}: {ways}."


def _response(status: ModelStatus, code: int) -> Response:
    return JSONResponse(_served(status).model_dump(mode="json"), code)


def _served(status: ModelStatus) -> ServedModel:
    spec, snapshot, description = status.spec, status.snapshot, status.description
    return ServedModel(
        alias=spec.alias,
        model_name=spec.name,
        source=snapshot.hub if snapshot is not None else spec.source,
        revision=snapshot.revision if snapshot is not None else spec.revision,
        path=str(snapshot.path) if snapshot is not None else None,
        configured=status.configured,
        preload=status.preload,
        state=status.state.value,
        error=status.error,
        unloaded_because=status.unload_reason,
        loaded_at=_time(status.loaded_at),
        last_used=_time(status.last_used),
        requests_served=status.requests_served,
        requests_per_s=status.requests_per_s,
        p95_s=status.p95_s,
        waiting_inputs=status.waiting_inputs,
        waiting_tokens=status.waiting_tokens,
        memory_bytes=status.memory_bytes,
        restarts=status.restarts,
        asked_precision=spec.precision,
        precision=description.precision if description is not None else None,
        device=description.device if description is not None else None,
        backend=description.backend if description is not None else None,
        dimensions=description.dimension if description is not None else None,
        max_input_tokens=description.max_length if description is not None else None,
        notes=list(description.notes) if description is not None else None,
        fidelity=FidelityObject.of(description.fidelity) if description is not None else None,
    )


def _time(unix_s: float | None) -> datetime | None:
    return datetime.fromtimestamp(unix_s, UTC) if unix_s is not None else None


def resolve_requested_model(settings: Settings, asked: ModelQuery, alias: str | None = None) -> ModelSpec:
    """Return the model that a query means.

    A directory is one only where the settings name it: else a caller could have any directory of this machine read.
    Code of a repository that the settings do not name never runs, whatever they trust: who may manage models is not
    yet one who may run programs here.

    Raises: RequestError, NotAllowedError; SettingsError where the precision contradicts the settings.
    """
    name = asked.model_name
    for param, value in (("model_name", name), ("alias", alias)):
        if value is not None and (not value.isprintable() or value != value.strip() or not value):
            raise RequestError(
                f"Invalid value for '{param}' = {value!r}: take printable text without spaces around it.",
                param=param,
            )
    try:
        spec = resolve_model(
            settings,
            name,
            alias=alias,
            source=asked.source,
            revision=asked.revision,
            precision=asked.precision,
        )
        is_directory = resolve_source(spec) == "local"
    except (OSError, RuntimeError, ValueError):  # what no system can look up
        raise RequestError(
            f"Invalid value for 'model_name' = {name!r}: give an alias, or a repository's id (owner/name).",
            param="model_name",
        ) from None
    if any(_same_files(spec, own) for own in settings.models.specs()):
        return spec
    if is_directory:
        raise NotAllowedError(
            f"{name!r} is a directory here, and may not be named over HTTP: let the operator name it in "
            "EMB_PROVIDER_MODEL_MAPPING, or load it with `emb-provider` on that machine. If a repository is meant, "
            "add its hub: &source=huggingface or &source=modelscope."
        )
    return replace(spec, trust_remote_code=False)


def is_same(left: ModelSpec, right: ModelSpec) -> bool:
    """Whether both mean one model, loaded in one way. A hub that was named may be the one that `auto` is."""
    return resolve_source(left) == resolve_source(right) and replace(left, source=right.source) == right


def _same_files(left: ModelSpec, right: ModelSpec) -> bool:
    if resolve_source(left) != resolve_source(right):
        return False
    ours, theirs = ((each.name, each.path, each.endpoint, each.revision) for each in (left, right))
    return ours == theirs
