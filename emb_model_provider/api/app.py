"""The composition root: creates all parts of the service from the settings, and the ASGI application."""

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

from emb_model_provider.api.auth import AccessPolicy, CorsMiddleware
from emb_model_provider.api.background_tasks import BackgroundTasks
from emb_model_provider.api.dependencies import Services
from emb_model_provider.api.errors import on_http_exception, on_validation_error
from emb_model_provider.api.limits import CONNECTIONS, BodyBudget, ConnectionLimiter
from emb_model_provider.api.middleware import AccessLogMiddleware, AuthAndLimitsMiddleware, TrustedHostMiddleware
from emb_model_provider.api.routes import cached_models, downloads, embeddings, loaded_models, models, operations
from emb_model_provider.api.routes.embeddings import EmbeddingsFastPath
from emb_model_provider.api.schemas.openai import EmbeddingRequest
from emb_model_provider.management.downloads import DownloadJobs
from emb_model_provider.management.manager import ModelManager
from emb_model_provider.observability.metrics import Metrics
from emb_model_provider.registry import Registry, RegistryConfig, State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from emb_model_provider.settings import ServerSettings, Settings

logger = logging.getLogger(__name__)

TITLE = "emb-model-provider"
DESCRIPTION = (
    "Embeddings through OpenAI's API, with models from ModelScope, Hugging Face or a directory. "
    'Every error has OpenAI\'s form: `{"error": {"message", "type", "param", "code"}}`.'
)

_JOBS_STOP_S = 2.0
"""How long downloads may take at shutdown to remove their partial files."""
_ROUTERS = (
    embeddings.router,
    models.router,
    loaded_models.router,
    downloads.router,
    cached_models.router,
    operations.router,
    operations.docs_router,
)


def create_app(
    settings: Settings,
    on_nothing_to_serve: Callable[[], None],
    on_hung: Callable[[str], None] | None = None,
    is_shutting_down: Callable[[], bool] = lambda: False,
) -> FastAPI:
    """Return the service as an ASGI application.

    Args:
        settings: All settings.
        on_nothing_to_serve: Called if no model could be loaded at startup.
        on_hung: Called with a message if a model hangs permanently.
        is_shutting_down: Returns whether the service was asked to stop, so that long operations end. Called on any
            thread.
    """
    services = _create_services(settings, is_shutting_down)
    registry = services.registry

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[dict[str, ConnectionLimiter]]:
        starting = asyncio.create_task(_start(registry, settings.server, on_nothing_to_serve))
        watching = asyncio.create_task(registry.watch(on_hung))
        yield {CONNECTIONS: ConnectionLimiter(settings.limits)}
        starting.cancel()
        watching.cancel()
        await asyncio.to_thread(services.jobs.stop, _JOBS_STOP_S)
        await registry.stop()
        logger.info("stopped")

    app = FastAPI(
        title=TITLE, description=DESCRIPTION, version=version("emb-model-provider"),
        lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False,
    )  # fmt: skip
    app.state.services = services
    app.openapi = _openapi(app, settings.server)  # type: ignore[method-assign]  # as FastAPI documents
    for router in _ROUTERS:
        app.include_router(router)
    # All other errors are handled by AuthAndLimitsMiddleware.
    app.add_exception_handler(HTTPException, on_http_exception)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    _add_middleware(app, services)
    return app


def _create_services(settings: Settings, is_shutting_down: Callable[[], bool]) -> Services:
    manager = ModelManager(settings)
    metrics = Metrics(lambda: registry.statuses())
    registry = Registry(
        settings.served_models(),
        manager,
        RegistryConfig(
            batching=settings.batching,
            limits=settings.limits,
            memory=settings.memory,
            watchdog_s=settings.lifecycle.watchdog_s,
            on_batch=metrics.on_batch,
        ),
    )
    return Services(
        settings=settings,
        registry=registry,
        manager=manager,
        jobs=DownloadJobs(manager),
        metrics=metrics,
        background=BackgroundTasks(is_shutting_down),
    )


def _add_middleware(app: FastAPI, services: Services) -> None:
    """Add all middleware, from the innermost to the outermost."""
    server, limits = services.settings.server, services.settings.limits
    policy = AccessPolicy(server)
    app.add_middleware(EmbeddingsFastPath, services=services)
    app.add_middleware(
        AuthAndLimitsMiddleware,
        policy=policy,
        max_body_bytes=limits.max_body_bytes,
        budget=BodyBudget(limits.max_pending_body_bytes),
    )
    # Outside of the middleware that creates error responses, so that pages can read those too.
    if server.cors_origins:
        app.add_middleware(CorsMiddleware, origins=server.cors_origins)
    if server.accepted_hosts is not None:
        app.add_middleware(TrustedHostMiddleware, policy=policy)
    app.add_middleware(AccessLogMiddleware, on_request=services.metrics.on_request)


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
            logger.warning("%s failed to load; a later request tries again", status.spec.alias)
        else:
            logger.info("%s is %s; it is loaded at its first request", status.spec.alias, status.state)
    body = orjson.dumps({"model": registry.default_alias, "input": "hello"}).decode()
    key = " -H 'Authorization: Bearer YOUR_KEY'" if server.accepted_keys else ""
    logger.info(
        "try it: curl %s/v1/embeddings -H 'Content-Type: application/json'%s -d %s", address, key, shlex.quote(body)
    )


def _openapi(app: FastAPI, server: ServerSettings) -> Callable[[], dict[str, Any]]:
    """Return the function that creates the OpenAPI document.

    It adds what FastAPI does not know: the request body of `POST /v1/embeddings`, which its route parses itself, and the
    API keys. It removes FastAPI's own error responses, which are never sent.
    """
    original = app.openapi
    keys = {"/v1": "apiKey"} if server.accepted_keys else {}
    if server.accepted_admin_keys or server.accepted_keys:
        keys["/api"] = "adminKey" if server.accepted_admin_keys else "apiKey"

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = original()  # it sets app.openapi_schema
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

    return openapi
