"""The parts of the service that routes use, provided by FastAPI's dependency injection."""

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
    from emb_model_provider.observability.metrics import Metrics
    from emb_model_provider.registry import Registry
    from emb_model_provider.settings import Settings

T = TypeVar("T")


def _pool(threads: int, name: str) -> Callable[[], ThreadPoolExecutor]:
    return lambda: ThreadPoolExecutor(threads, thread_name_prefix=name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """The parts of one service. Made once, in `app.create_app`."""

    settings: Settings
    registry: Registry
    manager: ModelManager
    jobs: DownloadJobs
    metrics: Metrics
    background: BackgroundTasks
    # Threads of their own: reading gigabytes must take neither the threads that requests for embeddings use, nor those
    # that list and remove models.
    _disk_threads: ThreadPoolExecutor = field(default_factory=_pool(4, "cache"))
    _verify_threads: ThreadPoolExecutor = field(default_factory=_pool(2, "verify"))

    async def on_disk(self, work: Callable[[], T]) -> T:
        """Run work that reads or changes the disk on a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._disk_threads, work)

    async def verifying(self, work: Callable[[], T]) -> T:
        """Run work that reads many gigabytes on a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._verify_threads, work)


def get_services(request: Request) -> Services:
    services: Services = request.app.state.services
    return services


ServicesDep = Annotated[Services, Depends(get_services)]
