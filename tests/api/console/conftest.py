"""The console without a process: the application, and a client with any address."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol

import httpx
import pytest

from emb_model_provider.api.app import Application, create_app
from emb_model_provider.settings import Settings

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

LOCAL, REMOTE = "127.0.0.1", "192.0.2.7"


class Open(Protocol):
    """Return a client of an application with some settings, and the application. No model is loaded."""

    def __call__(
        self, address: str = LOCAL, host: str = "localhost:9000", **settings: Any
    ) -> AbstractAsyncContextManager[tuple[httpx.AsyncClient, Application]]: ...


@pytest.fixture
def open_console(tmp_path: Path) -> Open:
    @asynccontextmanager
    async def open_it(
        address: str = LOCAL, host: str = "localhost:9000", **settings: Any
    ) -> AsyncIterator[tuple[httpx.AsyncClient, Application]]:
        directories = {name: tmp_path / name for name in ("cache_dir", "hf_cache_dir", "modelscope_cache_dir")}
        app = create_app(Settings.from_values(**directories, **settings), on_nothing_to_serve=lambda: None)
        transport = httpx.ASGITransport(app, client=(address, 1234))
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as client:
            yield client, app
        await app.state.services.batches.stop()

    return open_it
