"""The process that serves: the application under uvicorn, from its sockets to a clean end."""

from __future__ import annotations

import asyncio
import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn

from emb_model_provider.api.app import create_app
from emb_model_provider.api.http_protocol import HttpProtocol
from emb_model_provider.process.supervisor import BEAT_EVERY_S
from emb_model_provider.serving.memory_tuning import limit_malloc_arenas

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from emb_model_provider.process.shutdown import ShutdownSignal
    from emb_model_provider.settings import Settings

logger = logging.getLogger(__name__)

_KEEP_ALIVE_S = 75
"""Longer than the idle limit of the usual proxies and clients, so that they close first."""
_SHORTEST_GRACE_S = 0.2
"""uvicorn only looks every tenth of a second whether it has anything to wait for."""
_LAST_WORDS_S = 2.0
"""How long requests that are cut off at the end may take to say so."""


def serve(
    settings: Settings,
    sockets: list[socket.socket],
    stop: ShutdownSignal,
    *,
    on_hung: Callable[[str], None] | None = None,
    beat: Callable[[], None] | None = None,
) -> int:
    """Serve on `sockets`, which listen, until told to stop; return the process's exit code.

    `on_hung` is called with the reason when a model hangs for good, and `beat` every `BEAT_EVERY_S` seconds on the
    event loop, as long as that runs. Call this on the main thread.
    """
    limit_malloc_arenas()
    nothing_to_serve = False

    def give_up() -> None:
        nonlocal nothing_to_serve
        nothing_to_serve = True
        server.leave()

    config = uvicorn.Config(
        create_app(
            settings,
            on_nothing_to_serve=give_up,
            on_hung=on_hung,
            is_shutting_down=lambda: server.should_exit,
        ),
        log_config=None,
        access_log=False,
        server_header=False,
        http=HttpProtocol,
        # Nothing here is a WebSocket, and a caller's address is only believed as the socket has it.
        ws="none",
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )
    grace_s = max(_SHORTEST_GRACE_S, settings.lifecycle.shutdown_grace_s)
    config.timeout_graceful_shutdown = grace_s  # type: ignore[assignment]  # parts of a second work as well
    server = _Server(config, stop, beat)
    stop.on_shutdown(server.leave)
    # Not `server.run()`, which in the end waits for all threads, even one in the middle of a download.
    new_loop = config.get_loop_factory() or asyncio.new_event_loop
    new_loop().run_until_complete(server.serve(sockets))
    return 1 if nothing_to_serve else 0


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, stop: ShutdownSignal, beat: Callable[[], None] | None) -> None:
        super().__init__(config)
        self._stop = stop
        self._beat = beat

    def leave(self) -> None:
        """Stop in good order. May be called from any thread, and before the server has started."""
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to `ShutdownSignal`."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._beat is not None:
            self._beating = asyncio.create_task(_every(BEAT_EVERY_S, self._beat))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._stop.reason is not None:
            logger.info("%s: finishing the requests that were accepted", self._stop.reason)
        await super().shutdown(sockets)
        # What was open after the grace period has been cancelled, and may be about to tell its caller.
        if cut_off := list(self.server_state.tasks):
            await asyncio.wait(cut_off, timeout=_LAST_WORDS_S)


async def _every(pause_s: float, act: Callable[[], None]) -> None:
    while True:
        act()
        await asyncio.sleep(pause_s)
