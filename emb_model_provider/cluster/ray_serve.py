"""The service as an application of Ray Serve: `emb_model_provider.cluster.ray_serve:build` in the configuration of `serve deploy`.

Each replica is a whole service, with all routes and models of its settings (EMB_PROVIDER_... in the `runtime_env` of the
application). Ray's proxies distribute the requests, replace replicas that fail, and deploy without an interruption.
"""

from __future__ import annotations

import asyncio
import math
import secrets
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.metrics import Gauge

from emb_model_provider.api.app import create_app
from emb_model_provider.observability.logs import start_logging
from emb_model_provider.settings.loading import load_settings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    from emb_model_provider.api.app import Application
    from emb_model_provider.api.dependencies import Services
    from emb_model_provider.settings import Settings

_POLL_S = 0.1
_TOKENS = "queued_tokens"


class Options(BaseModel):
    """`args` of the application."""

    model_config = ConfigDict(extra="forbid")

    num_cpus: float = Field(default=1, gt=0)
    """Processors of a replica. The models use as many threads."""
    num_gpus: float = Field(default=0, ge=0)
    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int | None = Field(default=None, ge=1)
    """None: `min_replicas`, without scaling."""
    queued_tokens: float = Field(default=20_000, gt=0)
    """Tokens in the queue of a replica above which a further one is started."""
    upscale_delay_s: float = Field(default=30.0, ge=0)
    downscale_delay_s: float = Field(default=600.0, ge=0)
    max_ongoing_requests: int = Field(default=512, ge=1)
    """Requests that a proxy sends to a replica at the same time. The model needs many to fill its batches."""
    graceful_shutdown_timeout_s: float = Field(default=75.0, ge=0)
    """How long a replica that is replaced may answer its requests."""


class QueuedTokens:
    """Scales by the tokens that wait: one request can contain one text or 2,048."""

    def __init__(self, queued_tokens: float) -> None:
        self._queued_tokens = queued_tokens

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return the number of replicas, within the limits of the configuration, and no state."""
        waiting = sum(((context.aggregated_metrics or {}).get(_TOKENS) or {}).values())
        wanted = math.ceil(waiting / self._queued_tokens)
        lowest, highest = context.capacity_adjusted_min_replicas, context.capacity_adjusted_max_replicas
        return max(lowest, min(highest, wanted)), {}


@serve.deployment(name="service")
@serve.ingress()
class Service:
    """A replica."""

    def __init__(self) -> None:
        self._failure: str | None = None
        self._services: Services
        self._gauges: dict[str, Gauge] = {}

    def __serve_build_asgi_app__(self) -> Callable[..., Awaitable[None]]:
        settings, _ = load_settings()
        start_logging(settings.logs.model_copy(update={"log_to_file": False}))
        app = create_app(_behind_proxy(settings), self._on_nothing_to_serve, on_hung=self._on_hung)
        self._services = app.state.services
        return _AfterLoading(app, self._wait_until_loaded)

    async def check_health(self) -> None:
        """Raise RuntimeError if the replica must be replaced, because a model cannot answer again in this process.

        Ray calls this every 10 seconds, and exports its metrics as often, so they are updated here.
        """
        self._update_metrics()
        if self._failure is not None:
            raise RuntimeError(self._failure)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what `QueuedTokens` sums up."""
        return {_TOKENS: float(sum(status.waiting_tokens for status in self._services.registry.statuses()))}

    def _update_metrics(self) -> None:
        # All are gauges, because Ray's counters and histograms cannot be set. PromQL computes rates and quantiles of them, too.
        for sample in self._services.metrics.samples():
            if (gauge := self._gauges.get(sample.name)) is None:
                gauge = self._gauges[sample.name] = Gauge(sample.name, tag_keys=tuple(sample.labels))
            gauge.set(sample.value, tags=sample.labels)

    async def _wait_until_loaded(self) -> str | None:
        """Return None when all required models can answer, or the reason why none can."""
        while self._failure is None:
            statuses = self._services.registry.statuses()
            if all(status.is_available for status in statuses if status.required):
                return None
            await asyncio.sleep(_POLL_S)
        errors = (f"{status.spec.alias}: {status.error}" for status in self._services.registry.statuses())
        return f"{self._failure} ({'; '.join(errors)})"

    def _on_nothing_to_serve(self) -> None:
        self._failure = "no model could be loaded"

    def _on_hung(self, reason: str) -> None:
        self._failure = reason


class _AfterLoading:
    """Completes the startup of an application when its models are loaded, so that no replica gets requests before."""

    def __init__(self, app: Application, wait: Callable[[], Awaitable[str | None]]) -> None:
        self._app = app
        self._wait = wait

    async def __call__(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        async def send_after_loading(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "lifespan.startup.complete" and (problem := await self._wait()) is not None:
                message = {"type": "lifespan.startup.failed", "message": problem}
            await send(message)

        if scope["type"] == "lifespan":
            await self._app(scope, receive, send_after_loading)
        else:
            await self._app(_without_prefix(scope), receive, send)


def _without_prefix(scope: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Remove the `route_prefix` of the application from a path, because access rules, limits and metrics know paths without it."""
    path = scope["path"].removeprefix(scope.get("root_path", ""))
    return {**scope, "path": path or "/", "root_path": ""}


def build(options: Options) -> Any:
    """Return the application."""
    highest = options.max_replicas or options.min_replicas
    replicas: dict[str, Any] = {"num_replicas": options.min_replicas}
    if highest > options.min_replicas:
        policy = AutoscalingPolicy(
            policy_function=f"{QueuedTokens.__module__}:{QueuedTokens.__name__}",
            policy_kwargs={"queued_tokens": options.queued_tokens},
        )
        replicas = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=options.min_replicas,
                max_replicas=highest,
                upscale_delay_s=options.upscale_delay_s,
                downscale_delay_s=options.downscale_delay_s,
                policy=policy,
            )
        }
    deployment: Any = Service  # as the decorator returns it
    return deployment.options(
        ray_actor_options={"num_cpus": options.num_cpus, "num_gpus": options.num_gpus},
        max_ongoing_requests=options.max_ongoing_requests,
        graceful_shutdown_timeout_s=options.graceful_shutdown_timeout_s,
        **replicas,
    ).bind()


def _behind_proxy(settings: Settings) -> Settings:
    """Return the settings of a replica.

    Its clients are Ray's proxies, which run on the same machine: without keys they would count as its administrators, and
    their Host header is that of the cluster. The console and its sessions belong to one process.
    """
    server = settings.server
    changes: dict[str, Any] = {"console": False, "allowed_hosts": server.allowed_hosts or ("*",)}
    if not server.accepted_admin_keys:
        changes["admin_api_keys"] = SecretStr(secrets.token_urlsafe(32))
    batch_jobs = settings.batch_jobs
    has_database = batch_jobs.database_url is not None
    return settings.model_copy(
        update={
            "server": server.model_copy(update=changes),
            # Without a database that all replicas share, each would only know its own files and batches.
            "batch_jobs": batch_jobs.model_copy(update={"batches": batch_jobs.batches and has_database}),
        }
    )
