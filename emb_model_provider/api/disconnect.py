"""Work for a client that has gone away is work taken from the others."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

_WATCH_AFTER_S = 0.2
"""Most requests are answered sooner, and need no watcher."""


class ClientGoneError(Exception):
    """The client closed its connection before it was answered."""


@asynccontextmanager
async def cancelled_on_disconnect(request: Request) -> AsyncIterator[None]:
    """Cancel the block when the client goes away, and raise ClientGoneError. The body must have been read."""
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("must be entered in a task")
    gone = False
    watcher: asyncio.Task[None] | None = None

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    def start_watching() -> None:
        nonlocal watcher
        watcher = asyncio.create_task(watch())

    timer = asyncio.get_running_loop().call_later(_WATCH_AFTER_S, start_watching)
    try:
        yield
    except asyncio.CancelledError:
        # Someone else's cancellation, such as a shutdown's, goes on its way.
        if gone and task.uncancel() == 0:
            raise ClientGoneError from None
        raise
    finally:
        timer.cancel()
        if watcher is not None:
            watcher.cancel()
