"""What routes get by dependency injection: the parts of the service, and the record of the request."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from fastapi import Depends
from starlette.requests import Request

from emb_model_provider.errors import ModelNotReadyError
from emb_model_provider.serving.request_options import has_search_prompts

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from emb_model_provider.api.batch_service import BatchService
    from emb_model_provider.api.worker_sync import OtherWorkers
    from emb_model_provider.management.downloads import DownloadJobs
    from emb_model_provider.management.kept_models import KeptModels
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.model_spec import RequestDefaults
    from emb_model_provider.observability.metrics import Metrics, RequestRecord
    from emb_model_provider.observability.tracing import Tracing
    from emb_model_provider.registry import OnDemandModels, Registry
    from emb_model_provider.serving.engine import Engine
    from emb_model_provider.serving.results import Measured
    from emb_model_provider.settings import Settings

T = TypeVar("T")

RECORD = "emb_provider.record"
"""Key of the `RequestRecord` in a request's scope."""
REPLAYED = "emb_provider.replayed"
"""Key of the received messages of a request in its scope, if the worker keeps them to forward the request."""

_POLL_S = 0.25
_RETRY_AFTER_S = 5.0


class BackgroundTasks:
    """Tasks that continue when their caller goes away, and that do not delay the shutdown."""

    def __init__(self, is_shutting_down: Callable[[], bool]) -> None:
        self.is_shutting_down = is_shutting_down
        self._tasks: set[asyncio.Task[Any]] = set()

    def start(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        # Keep a reference, because the event loop does not, and the task could be garbage-collected.
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        # Retrieve the exception, because no caller may be left. The model's status shows the failure.
        task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return task

    async def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Start a task and return its result, or raise ModelNotReadyError if the service shuts down."""
        task = self.start(work)
        while not task.done():
            self.raise_if_shutting_down()
            await asyncio.wait({task}, timeout=_POLL_S)
        return task.result()

    def raise_if_shutting_down(self) -> None:
        if self.is_shutting_down():
            raise ModelNotReadyError("The service is shutting down. Try again later.", retry_after_s=_RETRY_AFTER_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The parts of one service. Created once, in `app.create_app`."""

    settings: Settings
    registry: Registry
    models: OnDemandModels
    manager: ModelManager
    jobs: DownloadJobs
    kept: KeptModels
    batches: BatchService
    metrics: Metrics
    tracing: Tracing | None
    """None without traces."""
    background: BackgroundTasks
    is_follower: bool = False
    """Whether this is one of several workers, and not the primary."""
    other_workers: OtherWorkers | None = None
    """None without other workers."""
    # Separate threads, so that hashing gigabytes delays neither requests for embeddings nor the listing of models.
    _disk_threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, thread_name_prefix="cache"))
    _verify_threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(2, thread_name_prefix="verify")
    )

    # One thread, because parsing a body can take many times its size, and blocks all other threads.
    _parse_thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="parse"))

    async def in_parse_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._parse_thread, work)

    async def in_disk_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._disk_threads, work)

    async def in_verify_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._verify_threads, work)


def get_services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


def get_record(request: Request) -> RequestRecord:
    record: RequestRecord = request.scope[RECORD]
    return record


@dataclass(frozen=True, slots=True)
class UsedModel:
    """A loaded model that a request uses."""

    name: str
    """The requested name, or the alias of the default model."""
    defaults: RequestDefaults
    """Those of requests that use this name."""
    engine: Engine


@asynccontextmanager
async def use_model(request: Request, services: Services, name: str | None) -> AsyncIterator[UsedModel]:
    """Keep the model that a name refers to in memory during the block; None is the default model."""
    registry = services.registry
    if name is None:
        name = registry.default_alias
    resolved = await services.models.resolve(name)
    get_record(request).model = resolved.alias
    async with registry.lease(resolved.alias) as engine:
        if resolved.needs_prompts and not has_search_prompts(engine.description):
            raise registry.not_found(name)
        if (replayed := request.scope.get(REPLAYED)) is not None:
            replayed.clear()  # it is not forwarded
        yield UsedModel(name, resolved.defaults, engine)


def fill_record(record: RequestRecord, inputs: int, measured: Measured) -> None:
    """Record how many inputs a request had, and their measurements."""
    record.inputs = inputs
    record.tokens = measured.tokens
    record.tokenize_s = measured.tokenize_s
    record.queue_s = measured.timing.queue_s
    record.inference_s = measured.timing.inference_s


ServicesDep = Annotated[Services, Depends(get_services)]
