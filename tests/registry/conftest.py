"""Fixtures of the registry's tests."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, cast

import pytest

from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.registry import Registry, RegistryConfig
from emb_model_provider.serving.config import Timings
from emb_model_provider.settings import LimitSettings, MemorySettings, ServedModels
from tests.registry.helpers import Fleet

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from emb_model_provider.management.manager import ModelManager


@pytest.fixture(autouse=True)
def quick_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the garbage collection, which takes nearly all the time of loading a fake model."""
    monkeypatch.setattr("emb_model_provider.serving.engine.freeze_gc", lambda: None)
    monkeypatch.setattr("emb_model_provider.serving.model_thread.trim_malloc", lambda: None)


@pytest.fixture
def fleet() -> Callable[..., Any]:
    """Return a function that starts a registry: `async with fleet("a", "b", max_loaded_models=1) as models`."""

    @asynccontextmanager
    async def start(
        *aliases: str,
        preload: tuple[str, ...] = (),
        watchdog_s: float = 60.0,
        request_timeout_s: float = 60.0,
        slow_load_s: float = 300.0,
        torch_while_compiling: bool = False,
        **memory: Any,
    ) -> AsyncIterator[Fleet]:
        models = Fleet(*aliases)
        models.registry = Registry(
            ServedModels(specs=tuple(ModelSpec(alias=alias, name=alias) for alias in aliases), preload=preload),
            cast("ModelManager", models),
            RegistryConfig(
                limits=LimitSettings(request_timeout_s=request_timeout_s),
                memory=MemorySettings(**memory),
                watchdog_s=watchdog_s,
                torch_while_compiling=torch_while_compiling,
                # Short, because a fake model that hangs does so until its gate is opened.
                timings=Timings(stop_s=0.05, slow_load_s=slow_load_s, restart_pauses_s=(0.0, 0.0, 0.0)),
            ),
        )
        try:
            yield models
        finally:
            for model in models.models.values():
                model.can_load.set()
                model.can_compile.set()
                for backend in model.backends:
                    backend.gate.set()
            await models.registry.stop()

    return start
