"""The one place that wires the parts: settings in, an ASGI application out."""

from __future__ import annotations

import asyncio
import logging
import shlex
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import orjson
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException

from emb_model_provider.api.auth import Cors, Doorkeeper
from emb_model_provider.api.errors import on_http_exception, on_invalid_parameters, on_provider_error
from emb_model_provider.api.limits import CONNECTIONS, Connections, PendingBodies
from emb_model_provider.api.middleware import Guard, HostCheck, RequestLog
from emb_model_provider.api.routes import cached_models as cache
from emb_model_provider.api.routes import downloads, embeddings, models
from emb_model_provider.api.routes import loaded_models as manage
from emb_model_provider.api.routes import operations as docs
from emb_model_provider.api.routes import operations as health
from emb_model_provider.api.schemas.openai import EmbeddingRequest
from emb_model_provider.errors import ProviderError
from emb_model_provider.management.downloads import DownloadJobs
from emb_model_provider.management.manager import ModelManager
from emb_model_provider.observability.metrics import Metrics
from emb_model_provider.registry import Registry, State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.types import ASGIApp

    from emb_model_provider.settings import ServerSettings, Settings

logger = logging.getLogger(__name__)

_JOBS_END_S = 2.0
"""How long downloads have at the end to remove what they did not finish."""

TITLE = "emb-model-provider"
DESCRIPTION = (
    "Embeddings behind the OpenAI API, from models of ModelScope, Hugging Face or a directory. "
    'Every error has OpenAI\'s form: `{"error": {"message", "type", "param", "code"}}`.'
)


def create_app(
    settings: Settings,
    on_nothing_to_serve: Callable[[], None],
    on_hung: Callable[[str], None] | None = None,
    is_stopping: Callable[[], bool] = lambda: False,
) -> ASGIApp:
    """Return the service.

    `on_nothing_to_serve` is called when every model failed to load at the start; `on_hung`, with what to say, when a
    model hangs for good. `is_stopping` says whether the service was asked to end: what could go on for long then ends.
    """
    server = settings.server()
    limits = settings.limits()
    metrics = Metrics(lambda: registry.statuses())
    manager = ModelManager(settings)
    jobs = DownloadJobs(manager)
    registry = Registry(
        settings.models(),
        manager=manager,
        hubs=settings.hubs(),
        trust=settings.trust(),
        batching=settings.batching(),
        limits=limits,
        max_artifact_bytes=int(settings.max_artifacts_gb * 1024**3),
        fidelity=settings.fidelity(),
        on_batch=metrics.on_batch,
        watchdog_s=settings.lifecycle().watchdog_s,
        residency=settings.residency(),
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, Connections]]:
        starting = asyncio.create_task(_start(registry, server, on_nothing_to_serve))
        watching = asyncio.create_task(registry.watch(on_hung))
        yield {CONNECTIONS: Connections(server)}
        starting.cancel()
        watching.cancel()
        await asyncio.to_thread(jobs.stop, _JOBS_END_S)
        await registry.stop()
        logger.info("stopped")

    app = FastAPI(
        title=TITLE, description=DESCRIPTION, version=version("emb-model-provider"),
        lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False,
    )  # fmt: skip
    embed = embeddings.embeddings_endpoint(registry, limits)
    app.include_router(embeddings.router(embed))
    app.include_router(models.router(registry))
    app.include_router(manage.router(settings, registry, is_stopping))
    app.include_router(downloads.router(settings, jobs, is_stopping))
    app.include_router(cache.router(manager, registry, is_stopping))
    app.include_router(health.router(registry, metrics))
    app.include_router(docs.docs_router(TITLE))
    app.add_exception_handler(ProviderError, on_provider_error)
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_invalid_parameters)
    doorkeeper = Doorkeeper(server)
    pending = PendingBodies(server.max_pending_body_bytes)
    # From the inside out. Errors pass through Cors, so that pages can read them.
    layers: list[tuple[Callable[..., ASGIApp], dict[str, Any]]] = [
        (Guard, {"doorkeeper": doorkeeper, "max_body_bytes": limits.max_body_bytes, "pending": pending})
    ]
    if server.cors_origins:
        layers.append((Cors, {"origins": server.cors_origins}))
    if server.allowed_hosts is not None:
        layers.append((HostCheck, {"doorkeeper": doorkeeper}))
    layers.append((RequestLog, {"on_request": metrics.on_request}))
    direct = embeddings.as_asgi(embed)
    for layer, options in layers:
        app.add_middleware(layer, **options)
        direct = layer(direct, **options)
    app.openapi = _openapi(app, server)  # type: ignore[method-assign]  # FastAPI's own way
    return embeddings.DirectEmbeddings(app, direct)


async def _start(registry: Registry, server: ServerSettings, on_nothing_to_serve: Callable[[], None]) -> None:
    if not await registry.preload():
        logger.error("no model could be loaded: stopping")
        on_nothing_to_serve()
        return
    host = f"[{server.host}]" if ":" in server.host else server.host
    address = f"http://{host}:{server.port}"
    for status in registry.statuses():
        if status.state is State.READY and status.description is not None:
            logger.info(
                "serving %s at %s (%s on %s)",
                status.spec.alias, address, status.description.precision, status.description.device,
            )  # fmt: skip
        elif status.state is State.FAILED:
            logger.warning("%s failed; a request after a while tries once more", status.spec.alias)
        else:
            logger.info("%s is %s; it is loaded at its first request", status.spec.alias, status.state)
    body = orjson.dumps({"model": registry.default_alias, "input": "hello"}).decode()
    key = " -H 'Authorization: Bearer YOUR_KEY'" if server.api_keys else ""
    logger.info(
        "try it: curl %s/v1/embeddings -H 'Content-Type: application/json'%s -d %s",
        address,
        key,
        shlex.quote(body),
    )


def _openapi(app: FastAPI, server: ServerSettings) -> Callable[[], dict[str, Any]]:
    """Describe the API with the request that `parsing.py` reads, which FastAPI does not see."""
    original = app.openapi
    keys = {"/v1": "apiKey"} if server.api_keys else {}
    if server.admin_api_keys or server.api_keys:
        keys["/api"] = "adminKey" if server.admin_api_keys else "apiKey"

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = original()
            request = EmbeddingRequest.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas = schema["components"]["schemas"]
            schemas.update(request.pop("$defs", {}))
            schemas[EmbeddingRequest.__name__] = request
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            for path, operations in schema["paths"].items():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
                    if (key := keys.get(f"/{path.split('/')[1]}")) is not None:
                        operation["security"] = [{key: []}]
            if keys:
                schema["components"]["securitySchemes"] = {
                    key: {"type": "http", "scheme": "bearer"} for key in sorted(set(keys.values()))
                }
        return app.openapi_schema or {}

    return described
