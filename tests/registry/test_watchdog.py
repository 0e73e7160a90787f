"""Models that are idle, and models that hang."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from emb_model_provider.registry import State
from tests.serving.fakes import LOSES_GPU
from tests.serving.helpers import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from emb_model_provider.registry import Registry


@asynccontextmanager
async def watching(registry: Registry, on_hung: Callable[[str], None] | None = None) -> AsyncIterator[None]:
    task = asyncio.create_task(registry.watch(on_hung))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_idle_model_is_unloaded_and_loaded_again(fleet: Callable[..., Any]) -> None:
    """After IDLE_UNLOAD_S without a request a model is unloaded, but never during a request."""
    async with fleet(*"ab", idle_unload_s=0.2) as models, watching(models.registry):
        holding = await models.hold("b")
        await models.embed("a")
        await until(lambda: models.state("a") is State.UNLOADED)
        assert models.registry.status("a").unload_reason == "idle"
        assert models.state("b") is State.READY
        assert len(await models.embed("a")) == 1
        models["b"].backend.gate.set()
        await holding
        await until(lambda: models.unloads().get("b") == {"idle": 1})


async def test_unloaded_model_that_hangs_is_still_reported(fleet: Callable[..., Any]) -> None:
    """`on_hung` is called for it, because only the end of the process frees its memory and its thread."""
    reports: list[str] = []
    async with fleet("a", watchdog_s=0.05, request_timeout_s=0.3) as models:
        holding = await models.hold("a")
        await asyncio.gather(holding, models.registry.unload("a"), return_exceptions=True)
        assert models.state("a") is State.UNLOADED
        async with watching(models.registry, reports.append):
            await until(lambda: reports)
            models["a"].backend.gate.set()
    assert reports[0].startswith("model a hangs:")


async def test_a_lost_gpu_is_reported(fleet: Callable[..., Any]) -> None:
    """`on_hung` is called, because only another process can use it. Until then, the model has failed."""
    reports: list[str] = []
    async with fleet("a", watchdog_s=0.05) as models:
        await asyncio.gather(models.embed("a", LOSES_GPU), return_exceptions=True)
        await until(lambda: models.state("a") is State.FAILED)
        async with watching(models.registry, reports.append):
            await until(lambda: reports)
        assert "illegal memory access" in models.registry.status("a").error
    assert reports[0].startswith("model a failed: The GPU has failed")
