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
from starlette.middleware.errors import ServerErrorMiddleware

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

    from starlette.types import ASGIApp, Lifespan, Receive, Scope, Send

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


class Application(FastAPI):
    """FastAPI with the middleware of the service around it.

    `EmbeddingsFastPath` is outside of FastAPI, because FastAPI's own outer layers take a sixth of the time of a request
    for a short text (see docs/performance.md).
    """

    def __init__(self, services: Services, lifespan: Lifespan[Application]) -> None:
        super().__init__(
            title=TITLE, description=DESCRIPTION, version=version("emb-model-provider"),
            lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False,
        )  # fmt: skip
        self.state.services = services
        for router in _ROUTERS:
            self.include_router(router)
        # All other errors are handled by AuthAndLimitsMiddleware.
        self.add_exception_handler(HTTPException, on_http_exception)
        self.add_exception_handler(RequestValidationError, on_validation_error)
        self._app = _add_middleware(super().__call__, services)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def build_middleware_stack(self) -> ASGIApp:
        stack = super().build_middleware_stack()
        # Starlette's layer would respond to errors, and raise them again, before AuthAndLimitsMiddleware sees them.
        return stack.app if isinstance(stack, ServerErrorMiddleware) else stack

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document.

        It has what FastAPI does not know: the request body of `POST /v1/embeddings`, which its route parses itself, and
        the API keys. It lacks FastAPI's own error responses, which are never sent.
        """
        if self.openapi_schema is not None:
            return self.openapi_schema
        document = super().openapi()
        schemas = document["components"]["schemas"]
        request = EmbeddingRequest.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(request.pop("$defs", {}))
        schemas[EmbeddingRequest.__name__] = request
        del schemas["HTTPValidationError"], schemas["ValidationError"]
        keys = _openapi_keys(self.state.services.settings.server)
        for path, path_item in document["paths"].items():
            for operation in path_item.values():
                operation["responses"].pop("422", None)
                if (key := keys.get(f"/{path.split('/')[1]}")) is not None:
                    operation["security"] = [{key: []}]
        if keys:
            document["components"]["securitySchemes"] = {
                key: {"type": "http", "scheme": "bearer"} for key in sorted(set(keys.values()))
            }
        return document


def create_app(
    settings: Settings,
    on_nothing_to_serve: Callable[[], None],
    on_hung: Callable[[str], None] | None = None,
    is_shutting_down: Callable[[], bool] = lambda: False,
) -> Application:
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
    async def lifespan(_: Application) -> AsyncIterator[dict[str, ConnectionLimiter]]:
        starting = asyncio.create_task(_start(registry, settings.server, on_nothing_to_serve))
        watching = asyncio.create_task(registry.watch(on_hung))
        yield {CONNECTIONS: ConnectionLimiter(settings.limits)}
        starting.cancel()
        watching.cancel()
        await asyncio.to_thread(services.jobs.stop, _JOBS_STOP_S)
        await registry.stop()
        logger.info("stopped")

    return Application(services, lifespan)


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


def _add_middleware(app: ASGIApp, services: Services) -> ASGIApp:
    server, limits = services.settings.server, services.settings.limits
    policy = AccessPolicy(server)
    app = EmbeddingsFastPath(app, services)
    app = AuthAndLimitsMiddleware(app, policy, limits.max_body_bytes, BodyBudget(limits.max_pending_body_bytes))
    # Outside of the middleware that creates error responses, so that pages can read those too.
    if server.cors_origins:
        app = CorsMiddleware(app, server.cors_origins)
    if server.accepted_hosts is not None:
        app = TrustedHostMiddleware(app, policy)
    return AccessLogMiddleware(app, services.metrics.on_request)


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


def _openapi_keys(server: ServerSettings) -> dict[str, str]:
    """Return the names of the keys that routes require, by the first part of their path."""
    keys = {"/v1": "apiKey"} if server.accepted_keys else {}
    if server.accepted_admin_keys or server.accepted_keys:
        keys["/api"] = "adminKey" if server.accepted_admin_keys else "apiKey"
    return keys
