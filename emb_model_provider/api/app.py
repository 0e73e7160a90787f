"""The composition root: creates all parts of the service from the settings, and the ASGI application."""

from __future__ import annotations

import asyncio
import logging
import shlex
from contextlib import asynccontextmanager, suppress
from functools import partial
from importlib.metadata import version
from itertools import chain
from typing import TYPE_CHECKING, Any

import orjson
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.errors import ServerErrorMiddleware

from emb_model_provider.api.auth import AccessPolicy, CorsMiddleware
from emb_model_provider.api.batch_calculator import ApiCalculator
from emb_model_provider.api.batch_service import BatchService
from emb_model_provider.api.console.page import Console
from emb_model_provider.api.console.routers import routers as console_routers
from emb_model_provider.api.dependencies import BackgroundTasks, Services
from emb_model_provider.api.errors import on_http_exception, on_validation_error
from emb_model_provider.api.limits import CONNECTIONS, MAY_ACCEPT, BodyBudget, ConnectionLimiter
from emb_model_provider.api.middleware import (
    AccessLogMiddleware,
    AuthAndLimitsMiddleware,
    TracingMiddleware,
    TrustedHostMiddleware,
)
from emb_model_provider.api.model_parts import create_model_parts
from emb_model_provider.api.paths import CONSOLE, CONSOLE_SIGN_IN, PathMiddleware
from emb_model_provider.api.quotas import Quotas
from emb_model_provider.api.routes import (
    azure,
    batches,
    cached_models,
    classify,
    cohere,
    dashscope,
    downloads,
    embeddings,
    files,
    llamafile,
    loaded_models,
    models,
    ollama,
    operations,
    rerank,
    tei,
    tokenize,
)
from emb_model_provider.api.routes.embeddings import EmbeddingsFastPath
from emb_model_provider.api.routes.loaded_models import resolve_requested_model
from emb_model_provider.api.schemas.batches import BatchRequest
from emb_model_provider.api.schemas.management import ModelQuery
from emb_model_provider.api.schemas.scores import REQUESTS
from emb_model_provider.api.sessions import Sessions
from emb_model_provider.api.worker_forwarding import Forwarding, PrivateApplication
from emb_model_provider.api.worker_sync import AppliedByAll, Follower, OtherWorkers, Primary
from emb_model_provider.errors import ProviderError
from emb_model_provider.formatting import describe_error
from emb_model_provider.management.downloads import DownloadJobs
from emb_model_provider.management.kept_models import KeptModels
from emb_model_provider.registry import FollowedModels, OnDemandModels, State

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Sequence

    from fastapi import APIRouter
    from starlette.types import ASGIApp, Lifespan, Receive, Scope, Send

    from emb_model_provider.api.model_parts import ModelParts
    from emb_model_provider.observability.metrics import RequestRecord
    from emb_model_provider.registry import Registry
    from emb_model_provider.settings import ServerSettings, Settings
    from emb_model_provider.workers import Worker

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
    rerank.router,
    classify.router,
    models.router,
    loaded_models.router,
    downloads.router,
    cached_models.router,
    operations.router,
    azure.router,
    cohere.router,
    dashscope.router,
    llamafile.router,
    ollama.router,
    tei.router,
    tokenize.router,
)


_BATCH_ROUTERS = (files.router, batches.router)


class Application(FastAPI):
    """FastAPI, with the middleware of the service and `EmbeddingsFastPath` around all of its own layers."""

    def __init__(
        self, services: Services, sessions: Sessions, lifespan: Lifespan[Application],
        worker: Worker | None = None, link: Primary | Follower | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            title=TITLE, description=DESCRIPTION, version=version("emb-model-provider"),
            lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False,
        )  # fmt: skip
        server = services.settings.server
        policy = AccessPolicy(server, sessions if server.console else None)
        has_batches = services.settings.batch_jobs.batches
        routers = [
            *_ROUTERS,
            *(_BATCH_ROUTERS if has_batches else ()),
            *(console_routers(has_batches=has_batches) if server.console else ()),
        ]
        self.state.services = services
        self.state.console = Console(services, policy, sessions)
        self.state.methods = _methods(routers)
        for router in routers:
            self.include_router(router)
        # All other errors are handled by AuthAndLimitsMiddleware.
        self.add_exception_handler(HTTPException, on_http_exception)
        self.add_exception_handler(RequestValidationError, on_validation_error)
        self.private: ASGIApp | None = None
        """What this worker answers to the other ones; None without others."""
        self._app = _add_middleware(super().__call__, services, policy, worker, link)
        if worker is not None:
            primary = link if isinstance(link, Primary) else None
            self.private = PrivateApplication(self._app, partial(_live_metrics, services), primary)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)

    def build_middleware_stack(self) -> ASGIApp:
        stack = super().build_middleware_stack()
        # Starlette's outermost layer would respond to errors itself, before AuthAndLimitsMiddleware receives them.
        return stack.app if isinstance(stack, ServerErrorMiddleware) else stack

    def openapi(self) -> dict[str, Any]:
        """Return the OpenAPI document.

        It has what FastAPI does not know: the request bodies that routes parse themselves, the API keys, and a URL of the
        service that is relative to that of the document, and so right behind a proxy that adds a prefix. It lacks FastAPI's
        own error responses, which are never sent.
        """
        if self.openapi_schema is not None:
            return self.openapi_schema
        document = super().openapi()
        document["servers"] = [{"url": "."}]
        schemas = document["components"]["schemas"]
        has_batches = self.state.services.settings.batch_jobs.batches
        for model in (*REQUESTS, *((BatchRequest,) if has_batches else ())):
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas |= {**schema.pop("$defs", {}), model.__name__: schema}
        del schemas["HTTPValidationError"], schemas["ValidationError"]
        server: ServerSettings = self.state.services.settings.server
        keys = {"/v1": "apiKey"} if server.accepted_keys else {}
        if server.accepted_admin_keys or server.accepted_keys:
            keys["/api"] = "adminKey" if server.accepted_admin_keys else "apiKey"
        for path, path_item in document["paths"].items():
            for operation in path_item.values():
                operation["responses"].pop("422", None)
                if (key := keys.get(f"/{path.split('/')[1]}")) is not None:
                    operation["security"] = [{key: []}]
        if keys:
            schemes = {key: {"type": "http", "scheme": "bearer"} for key in sorted(set(keys.values()))}
            document["components"]["securitySchemes"] = schemes
        return document


def create_app(
    settings: Settings,
    on_nothing_to_serve: Callable[[], None],
    on_hung: Callable[[str], None] | None = None,
    is_shutting_down: Callable[[], bool] = lambda: False,
    worker: Worker | None = None,
    *,
    is_restarted: bool = False,
    parts: ModelParts | None = None,
) -> Application:
    """Return the service as an ASGI application. `is_shutting_down` is called on any thread.

    `worker` is the one of several that this process is, and `is_restarted` whether it takes the place of another process. Pass
    `parts` if they load models already.
    """
    is_follower = worker is not None and not worker.is_primary
    share = settings if worker is None else settings.share_of_worker()

    async def wait_for_workers() -> None:
        if isinstance(link, Primary):
            await link.wait_until_applied(unloaded=True)

    parts = create_model_parts(settings, worker, wait_for_workers) if parts is None else parts
    registry, manager, metrics, tracing = parts.registry, parts.manager, parts.metrics, parts.tracing
    jobs = DownloadJobs(manager)
    sessions = Sessions()
    kept = KeptModels(settings.hubs.cache_dir)
    kept_aliases = [] if is_follower else _add_kept(settings, registry, kept)
    batch_service = BatchService(settings, lambda: ApiCalculator(services, metrics.on_lines))

    @asynccontextmanager
    async def lifespan(_: Application) -> AsyncIterator[dict[str, Any]]:
        tasks = [asyncio.create_task(registry.watch(on_hung))]
        if isinstance(link, Follower):
            tasks.append(asyncio.create_task(link.run()))
        else:
            _announce_console(settings.server, sessions)
            start = _start(parts, settings, kept_aliases, on_nothing_to_serve, may_accept.set)
            tasks.append(asyncio.create_task(start))
            await batch_service.start()
        if isinstance(link, Primary):
            tasks.append(asyncio.create_task(link.watch()))
            if not is_restarted:  # otherwise the others answer until it has loaded its models
                may_accept.set()
        yield {CONNECTIONS: ConnectionLimiter(share.limits, worker), MAY_ACCEPT: may_accept}
        for task in tasks:
            task.cancel()
        await batch_service.stop()
        await asyncio.to_thread(jobs.stop, _JOBS_STOP_S)
        await registry.stop()
        if tracing is not None:
            await asyncio.to_thread(tracing.stop)
        logger.info("stopped")

    background = BackgroundTasks(is_shutting_down)
    services = Services(
        settings=settings,
        registry=registry,
        models=(FollowedModels if is_follower else OnDemandModels)(
            registry, manager.index, jobs, serves_cached=settings.serves_cached
        ),
        manager=manager,
        jobs=jobs,
        kept=kept,
        batches=batch_service,
        metrics=metrics,
        tracing=tracing,
        background=background,
        is_follower=is_follower,
        other_workers=OtherWorkers(worker) if worker is not None else None,
    )
    may_accept = asyncio.Event()
    link: Primary | Follower | None = None
    if worker is not None and worker.is_primary:
        link = Primary(worker, registry, batch_service, metrics.activity, is_restarted=is_restarted)
    elif worker is not None:
        link = Follower(worker, registry, batch_service, metrics.activity, may_accept.set)
    return Application(services, sessions, lifespan, worker, link)


async def _live_metrics(services: Services) -> str:
    await operations.update_job_figures(services)
    return services.metrics.live_text()


def _add_kept(settings: Settings, registry: Registry, kept: KeptModels) -> list[str]:
    """Serve the models of `load --keep` again, and return their aliases. A wrong one is logged, and not served."""
    aliases = []
    for model in kept.read():
        try:
            query = ModelQuery(**model.model_dump(exclude={"alias"}))
            aliases.append(registry.add(resolve_requested_model(settings, query, model.alias)))
        except (ProviderError, ValidationError) as error:
            logger.warning(
                "model %s is not served, although %s has it: %s", model.alias, kept.path, describe_error(error)
            )
    return aliases


def _methods(routers: Iterable[APIRouter]) -> dict[str, set[str]]:
    """Return the methods of each path, from which the error for an unknown path names the most similar one."""
    methods: dict[str, set[str]] = {}
    for route in chain.from_iterable(router.routes for router in routers):
        if isinstance(route, APIRoute):
            methods.setdefault(route.path, set()).update(route.methods or ())
    return methods


def _add_middleware(
    app: ASGIApp, services: Services, policy: AccessPolicy, worker: Worker | None, link: Primary | Follower | None
) -> ASGIApp:
    server, limits = services.settings.server, services.settings.limits
    app = EmbeddingsFastPath(app, services)
    if worker is None:
        quotas = Quotas(server.quotas)
    else:
        limits = services.settings.share_of_worker().limits
        quotas = Quotas(server.quotas, shared=worker.shared_memory(), names=server.key_names)
    app = AuthAndLimitsMiddleware(
        app,
        policy,
        limits,
        BodyBudget(limits.max_pending_body_bytes),
        quotas,
        services.settings.batch_jobs.max_file_bytes,
    )
    # Outside of the middleware that creates error responses, so that pages can read those too.
    if server.cors_origins:
        app = CorsMiddleware(app, server.cors_origins)
    if server.checks_hosts:
        app = TrustedHostMiddleware(app, policy)
    if services.tracing is not None:
        app = TracingMiddleware(app, services.tracing)

    def on_request(record: RequestRecord) -> None:
        services.metrics.on_request(record)
        quotas.charge(record.key_name, record.tokens)

    app = AccessLogMiddleware(app, on_request)
    if isinstance(link, Primary):
        app = AppliedByAll(app, link)
    elif worker is not None:
        app = Forwarding(app, worker, services.background.is_shutting_down)
    return PathMiddleware(app)


def _announce_console(server: ServerSettings, sessions: Sessions) -> None:
    if not server.console:
        return
    logger.info("console: %s%s", server.local_url, CONSOLE)
    if not server.accepted_admin_keys and not server.is_on_loopback:
        # The browser may be on another machine, as it always is for a container.
        token = sessions.create_link()
        logger.info(
            "console from another machine, once: %s%s?token=%s (with the name of this machine in place of the address)",
            server.local_url, CONSOLE_SIGN_IN, token,
        )  # fmt: skip


async def _start(
    parts: ModelParts,
    settings: Settings,
    kept: Sequence[str],
    on_nothing_to_serve: Callable[[], None],
    on_preloaded: Callable[[], None],
) -> None:
    server, registry = settings.server, parts.registry
    has_models = await parts.begin_preloading()
    on_preloaded()
    if not has_models:
        logger.error("no model could be loaded: stopping")
        on_nothing_to_serve()
        return
    for status in registry.statuses():
        if status.state is State.READY and status.description is not None:
            logger.info(
                "serving %s at %s (%s on %s)",
                status.spec.alias, server.local_url, status.description.precision, status.description.device,
            )  # fmt: skip
        elif status.state is State.FAILED:
            logger.warning("%s failed to load; a later request tries again", status.spec.alias)
        else:
            logger.info("%s is %s; it is loaded at its first request", status.spec.alias, status.state)
    body = orjson.dumps({"model": registry.default_alias, "input": "hello"}).decode()
    key = " -H 'Authorization: Bearer YOUR_KEY'" if server.accepted_keys else ""
    logger.info(
        "try it: curl %s/v1/embeddings -H 'Content-Type: application/json'%s -d %s",
        server.local_url,
        key,
        shlex.quote(body),
    )
    limit = settings.memory.max_loaded_models
    loaded = sum(status.state is State.READY for status in registry.statuses())
    for alias in kept if limit is None else kept[: max(0, limit - loaded)]:
        with suppress(ProviderError):  # which was logged; a later request tries again
            await registry.load(alias)
