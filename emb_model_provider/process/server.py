"""Runs the application under uvicorn until the process is to shut down."""

from __future__ import annotations

import asyncio
import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import uvicorn

from emb_model_provider.api.app import create_app
from emb_model_provider.api.http_protocol import HttpProtocol
from emb_model_provider.api.limits import CONNECTIONS, MAY_ACCEPT, ConnectionLimiter
from emb_model_provider.process.supervisor import HEARTBEAT_EVERY_S

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterator

    from starlette.types import ASGIApp

    from emb_model_provider.api.model_parts import ModelParts
    from emb_model_provider.process.shutdown import ShutdownSignal
    from emb_model_provider.settings import Settings
    from emb_model_provider.workers import Worker

logger = logging.getLogger(__name__)

_KEEP_ALIVE_S = 75
"""Longer than the idle timeout of common proxies and clients, so that they close connections first."""
_MIN_GRACE_S = 0.2
"""uvicorn checks only every 0.1 s whether requests are left."""
_ACCEPT_AGAIN_S = 0.5
"""How long to wait after a connection could not be accepted."""
_OTHERS_ACCEPT_S = 0.001
"""How long a worker with more connections than another one lets that one accept first."""
_CANCELLED_REQUESTS_S = 2.0
"""How long requests that are cancelled after the grace period may take to send their error."""


async def serve(
    settings: Settings,
    parts: ModelParts | None,
    sockets: list[socket.socket],
    shutdown: ShutdownSignal,
    *,
    on_hung: Callable[[str], None] | None,
    beat: Callable[[], None] | None,
    worker: Worker | None,
    is_restarted: bool,
) -> int:
    """Serve until the process is to shut down; see `emb_model_provider.process.startup.serve`."""
    app = create_app(
        settings,
        on_nothing_to_serve=lambda: server.request_shutdown(exit_code=1),
        on_hung=on_hung,
        is_shutting_down=lambda: server.should_exit,
        worker=worker,
        is_restarted=is_restarted,
        parts=parts,
    )
    config = _config(app)
    grace_s = max(_MIN_GRACE_S, settings.lifecycle.shutdown_grace_s)
    config.timeout_graceful_shutdown = grace_s  # type: ignore[assignment]  # fractions of a second work as well
    server = _Server(config, shutdown, beat)
    if worker is not None and app.private is not None:
        server.private = _PrivateSocket(worker.socket, _config(app.private), ConnectionLimiter(settings.limits))
    shutdown.on_shutdown(server.request_shutdown)
    await server.serve(sockets)
    return server.exit_code


def _config(app: ASGIApp) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        http=HttpProtocol,
        # There are no WebSocket routes, and headers about the client's address are not trusted.
        ws="none",
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
    )


@dataclass(frozen=True, slots=True)
class _PrivateSocket:
    """Where a worker answers the other ones."""

    listening: socket.socket
    config: uvicorn.Config
    limiter: ConnectionLimiter


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, shutdown: ShutdownSignal, beat: Callable[[], None] | None) -> None:
        super().__init__(config)
        self.exit_code = 0
        self._shutdown_signal = shutdown
        self._beat = beat
        self.private: _PrivateSocket | None = None
        self._accepting: list[asyncio.Task[None]] = []
        self._accepting_workers: asyncio.Task[None] | None = None
        self._starting: set[asyncio.Task[object]] = set()
        """Accepted connections without a protocol yet."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install no signal handlers, because `ShutdownSignal` has done so."""
        yield

    def request_shutdown(self, exit_code: int = 0) -> None:
        """Shut down gracefully. Can be called from any thread, and before the server has started."""
        self.exit_code = self.exit_code or exit_code
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=[])
        accept = self._accept
        if self.private is not None:
            self.private.config.load()
            self._accepting_workers = asyncio.create_task(self._accept_workers(self.private))
            accept = self._accept_fairly
        self._accepting = [asyncio.create_task(accept(listening)) for listening in sockets or ()]
        if self._beat is not None:
            self._beating = asyncio.create_task(_send_heartbeats(self._beat))

    async def _accept(self, listening: socket.socket) -> None:
        """Accept connections as long as not too many are open, which the servers of asyncio cannot.

        The others wait in the queue of the operating system, so that a burst of clients is answered and not rejected.
        """
        loop = asyncio.get_running_loop()
        limiter: ConnectionLimiter = self.lifespan.state[CONNECTIONS]
        listening.setblocking(False)
        while True:
            await limiter.has_space.wait()
            try:
                connection, _ = await loop.sock_accept(listening)
                self._start_connection(connection, limiter)
                while limiter.has_space.is_set():  # all that wait now, in one turn of the event loop
                    connection, _ = listening.accept()
                    self._start_connection(connection, limiter)
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError as error:  # such as without a free file descriptor
                logger.warning("a connection could not be accepted: %s", error.strerror)
                await asyncio.sleep(_ACCEPT_AGAIN_S)

    async def _accept_fairly(self, listening: socket.socket) -> None:
        """Accept connections as one of several workers, which share the socket, so that all have equally many.

        The operating system gives a connection to the worker that asks first, and one that is idle asks for all that wait.
        Clients keep their connections, so a few workers would get most requests. Therefore a worker that has more connections
        than another one waits a moment before each. With a socket for each worker (SO_REUSEPORT), connections would be
        distributed at random, and those for a worker that is restarted or hangs would wait for it.
        """
        loop = asyncio.get_running_loop()
        limiter: ConnectionLimiter = self.lifespan.state[CONNECTIONS]
        may_accept: asyncio.Event = self.lifespan.state[MAY_ACCEPT]
        listening.setblocking(False)
        await may_accept.wait()
        limiter.start_accepting()
        while True:
            await limiter.has_space.wait()
            await _wait_for_connection(loop, listening)
            if limiter.excess() > 0:
                await asyncio.sleep(_OTHERS_ACCEPT_S)
            try:
                connection, _ = listening.accept()
            except (BlockingIOError, ConnectionAbortedError):
                continue
            except OSError as error:  # such as without a free file descriptor
                logger.warning("a connection could not be accepted: %s", error.strerror)
                await asyncio.sleep(_ACCEPT_AGAIN_S)
            else:
                self._start_connection(connection, limiter)

    async def _accept_workers(self, private: _PrivateSocket) -> None:
        """Accept connections of other workers."""
        loop = asyncio.get_running_loop()
        state = {**self.lifespan.state, CONNECTIONS: private.limiter}

        def create_protocol() -> HttpProtocol:
            return HttpProtocol(private.config, self.server_state, state)

        private.listening.setblocking(False)
        while True:
            try:
                connection, _ = await loop.sock_accept(private.listening)
            except OSError as error:
                logger.warning("a connection of another worker could not be accepted: %s", error.strerror)
                await asyncio.sleep(_ACCEPT_AGAIN_S)
            else:
                self._start_connection(connection, private.limiter, create_protocol)

    def _start_connection(
        self,
        connection: socket.socket,
        limiter: ConnectionLimiter,
        create_protocol: Callable[[], HttpProtocol] | None = None,
    ) -> None:
        connection.setblocking(False)
        limiter.on_accepted()
        start = asyncio.get_running_loop().connect_accepted_socket(create_protocol or self._create_protocol, connection)
        starting = asyncio.create_task(start)
        self._starting.add(starting)

        def on_started(task: asyncio.Task[object]) -> None:
            self._starting.discard(task)
            if task.cancelled() or task.exception() is not None:  # it has no protocol, which would count it
                limiter.on_closed()

        starting.add_done_callback(on_started)

    def _create_protocol(self) -> HttpProtocol:
        return HttpProtocol(self.config, self.server_state, self.lifespan.state)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._shutdown_signal.reason is not None:
            logger.info("shutting down (%s), finishing accepted requests", self._shutdown_signal.reason)
        for accepting in self._accepting:
            accepting.cancel()
        await asyncio.gather(*self._accepting, *self._starting, return_exceptions=True)
        await super().shutdown(sockets)
        if self._accepting_workers is not None:  # only now, because their requests had been accepted
            self._accepting_workers.cancel()
        # Requests that were cancelled after the grace period may be about to send their error.
        if cancelled := list(self.server_state.tasks):
            await asyncio.wait(cancelled, timeout=_CANCELLED_REQUESTS_S)


async def _wait_for_connection(loop: asyncio.AbstractEventLoop, listening: socket.socket) -> None:
    """Wait until a connection waits at a socket. Another process may accept it."""
    waiting: asyncio.Future[None] = loop.create_future()

    def set_done() -> None:
        if not waiting.done():
            waiting.set_result(None)

    loop.add_reader(listening, set_done)
    try:
        await waiting
    finally:
        loop.remove_reader(listening)


async def _send_heartbeats(beat: Callable[[], None]) -> None:
    while True:
        beat()
        await asyncio.sleep(HEARTBEAT_EVERY_S)
