"""What routes get by dependency injection: the parts of the service, and the record of the request."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, TypeVar

from fastapi import Depends
from starlette.requests import Request

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.api.background_tasks import BackgroundTasks
    from emb_model_provider.management.downloads import DownloadJobs
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.observability.metrics import Metrics, RequestRecord
    from emb_model_provider.registry import Registry
    from emb_model_provider.settings import Settings

T = TypeVar("T")

RECORD = "emb_provider.record"
"""Key of the `RequestRecord` in a request's scope."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The parts of one service. Created once, in `app.create_app`."""

    settings: Settings
    registry: Registry
    manager: ModelManager
    jobs: DownloadJobs
    metrics: Metrics
    background: BackgroundTasks
    # Separate threads, so that hashing gigabytes delays neither requests for embeddings nor the listing of models.
    _disk_threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(4, thread_name_prefix="cache"))
    _verify_threads: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(2, thread_name_prefix="verify")
    )

    async def in_disk_thread(self, work: Callable[[], T]) -> T:
        """Run work that reads or changes the caches on a thread, and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self._disk_threads, work)

    async def in_verify_thread(self, work: Callable[[], T]) -> T:
        """Run work that reads many gigabytes on a thread, and return its result."""
        return await asyncio.get_running_loop().run_in_executor(self._verify_threads, work)


def get_services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


def get_record(request: Request) -> RequestRecord:
    record: RequestRecord = request.scope[RECORD]
    return record


ServicesDep = Annotated[Services, Depends(get_services)]
