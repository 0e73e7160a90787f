"""The parts of the service that load models. They need no HTTP, so that models can be loaded before FastAPI is imported."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from emb_model_provider.backends.hardware import total_memory
from emb_model_provider.management.manager import ModelManager
from emb_model_provider.observability.metrics import Metrics
from emb_model_provider.observability.tracing import start_tracing
from emb_model_provider.registry import Registry, RegistryConfig
from emb_model_provider.registry.lifecycle import no_workers
from emb_model_provider.serving.config import QUEUE_BYTES
from emb_model_provider.serving.result_cache import ResultCache
from emb_model_provider.settings import MemorySettings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from emb_model_provider.observability.tracing import Tracing
    from emb_model_provider.settings import Settings
    from emb_model_provider.workers import Worker

T = TypeVar("T")

_MEMORY_SHARE = 0.75
"""How much of the memory of the machine models may take that requests load without a limit in the settings."""


@dataclass(slots=True, kw_only=True)
class ModelParts:
    """The registry of a service, and what it reports to."""

    manager: ModelManager
    metrics: Metrics
    registry: Registry
    tracing: Tracing | None
    _preloading: asyncio.Task[bool] | None = field(default=None, init=False)

    def begin_preloading(self) -> asyncio.Task[bool]:
        """Start to load the models that are to be loaded at startup, and return the task; see `Registry.preload`."""
        if self._preloading is None:
            self._preloading = asyncio.create_task(self.registry.preload())
        return self._preloading


def create_model_parts(
    settings: Settings, worker: Worker | None = None, wait_for_workers: Callable[[], Awaitable[None]] = no_workers
) -> ModelParts:
    """Create the parts. `worker` is the one of several that this process is; see `RegistryConfig` for `wait_for_workers`."""
    is_follower = worker is not None and not worker.is_primary
    workers = worker.count if worker is not None else 1
    share = settings if worker is None else settings.share_of_worker()
    result_cache = ResultCache(share.memory.result_cache_bytes)
    metrics = Metrics(lambda: registry.statuses(), lambda: result_cache.size_bytes, worker)
    manager = ModelManager(settings, on_work=metrics.on_work)
    tracing = start_tracing()
    registry = Registry(
        settings.served_models(),
        manager,
        RegistryConfig(
            batching=share.batching,
            limits=settings.limits,
            # The primary decides what is unloaded.
            memory=MemorySettings(load_wait_s=settings.memory.load_wait_s) if is_follower else share.memory,
            watchdog_s=settings.lifecycle.watchdog_s,
            on_batch=metrics.on_batch if tracing is None else _each(metrics.on_batch, tracing.on_batch),
            result_cache=result_cache,
            on_lookup=metrics.on_lookup,
            on_stages=metrics.on_stages if tracing is None else _each(metrics.on_stages, tracing.on_stages),
            torch_while_compiling=settings.models.torch_while_compiling and not is_follower,
            default_memory_bytes=(
                int(_MEMORY_SHARE * total_memory()) // workers if settings.serves_cached and not is_follower else None
            ),
            wait_for_workers=wait_for_workers,
            queue_bytes=QUEUE_BYTES // workers,
        ),
    )
    return ModelParts(manager=manager, metrics=metrics, registry=registry, tracing=tracing)


def _each(first: Callable[[T], None], second: Callable[[T], None]) -> Callable[[T], None]:
    """Return a function that calls both."""

    def call(record: T) -> None:
        first(record)
        second(record)

    return call
