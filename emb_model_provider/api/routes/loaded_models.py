"""GET /api/models, POST /api/models/load and /api/models/unload: which models are in memory."""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query
from starlette.responses import JSONResponse, Response

from emb_model_provider.api.background_tasks import GoingOn
from emb_model_provider.api.errors import AliasInUseError
from emb_model_provider.api.schemas.management import (
    LoadQuery,
    Process,
    ServedModel,
    ServedModels,
    UnloadQuery,
    fidelity_object,
)
from emb_model_provider.api.schemas.openai import error_responses
from emb_model_provider.errors import ModelNotFoundError, NotAllowedError, RequestError
from emb_model_provider.model_resolver import choose, resolve_source

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.api.schemas.management import Which
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.registry import ModelStatus, Registry
    from emb_model_provider.settings import Settings


def router(settings: Settings, registry: Registry, is_stopping: Callable[[], bool]) -> APIRouter:
    routes = APIRouter(tags=["management"])
    going_on = GoingOn(is_stopping)

    @routes.get(
        "/api/models",
        summary="List the served models and what they take",
        responses=error_responses(401, 403),
    )
    async def list_served() -> ServedModels:
        statuses = registry.statuses()
        residency = settings.residency()
        return ServedModels(
            models=[described(status) for status in statuses],
            process=Process(
                pid=os.getpid(),
                version=version("emb-model-provider"),
                resident_bytes=_resident_bytes(),
                models_memory_bytes=sum(status.memory_bytes or 0 for status in statuses),
                memory_limit_bytes=residency.memory_limit_bytes,
                max_loaded_models=residency.max_loaded_models,
            ),
        )

    @routes.post(
        "/api/models/load",
        summary="Load a model",
        description="One that is not in the settings is served from now on, until it is forgotten or the service stops; "
        "it is forgotten at once where loading it fails, unless nobody waits for that.",
        response_model=ServedModel,
        responses={
            202: {"model": ServedModel, "description": "With `wait=false`: it is being loaded."},
            **error_responses(400, 401, 403, 404, 409, 500, 502, 503),
        },
    )
    async def load(query: Annotated[LoadQuery, Query()]) -> Response:
        alias = _known(registry, query)
        is_new = alias is None
        if alias is None:
            # Choosing looks at the disk for directories.
            spec = await asyncio.to_thread(spec_named, settings, query, query.alias)
            present = _meant_by(registry, spec.alias)
            if present is not None and not is_same(present.spec, spec):
                raise AliasInUseError(_in_use(spec.alias, present))
            is_new = present is None
            alias = registry.add(spec) if present is None else spec.alias
        if not query.wait:
            going_on.begin(registry.load(alias))
            await asyncio.sleep(0)  # so that its state is that of a model being loaded
            return _answer(registry.status(alias), 202)

        async def loaded() -> ModelStatus:
            try:
                return await registry.load(alias)
            except Exception:
                if is_new and not is_stopping():
                    with suppress(ModelNotFoundError):  # somebody forgot it meanwhile
                        await registry.forget(alias)
                raise

        return _answer(await going_on.finished(loaded()), 200)

    @routes.post(
        "/api/models/unload",
        summary="Unload a model",
        description="Its requests are answered first. The next request for it loads it again.",
        responses=error_responses(400, 401, 403, 404, 503),
    )
    async def unload(query: Annotated[UnloadQuery, Query()]) -> ServedModel:
        alias = registry.alias_of(query.model_name)
        leave = registry.forget if query.forget else registry.unload
        return described(await going_on.finished(leave(alias)))

    return routes


def _known(registry: Registry, query: LoadQuery) -> str | None:
    """Return the alias of the served model that a query names and nothing more; None where it says how to load it."""
    if query.alias or query.source or query.revision or query.precision:
        return None
    try:
        return registry.alias_of(query.model_name)
    except ModelNotFoundError:
        return None


def _meant_by(registry: Registry, name: str) -> ModelStatus | None:
    """Return the served model that requests mean by a name, if there is one."""
    try:
        return registry.status(name)
    except ModelNotFoundError:
        return None


def _in_use(name: str, present: ModelStatus) -> str:
    spec = present.spec
    how = f"{spec.name} (source {spec.source}, revision {spec.revision or 'default'}, precision {spec.precision})"
    served = "" if name == spec.alias else f", served as `{spec.alias}`"
    ways = "give the other one a name of its own: &alias=…"
    if not present.configured:
        ways += f", or end this one: POST /api/models/unload?model_name={spec.alias}&forget=true"
    return f"`{name}` means {how}{served}: {ways}."


def _answer(status: ModelStatus, code: int) -> Response:
    return JSONResponse(described(status).model_dump(mode="json"), code)


def described(status: ModelStatus) -> ServedModel:
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
        unloaded_because=status.unloaded_because,
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
        fidelity=fidelity_object(description.fidelity) if description is not None else None,
    )


def _time(unix_s: float | None) -> datetime | None:
    return datetime.fromtimestamp(unix_s, UTC) if unix_s is not None else None


def _resident_bytes() -> int | None:
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - quicker, and always there or never
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, AttributeError):
        return None


def spec_named(settings: Settings, asked: Which, alias: str | None = None) -> ModelSpec:
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
        spec = choose(
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
    if any(_same_files(spec, own) for own in settings.models().specs):
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
