"""`python -m emb_model_provider.main`: the service, from settings to a clean end."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, NoReturn

import uvicorn

from emb_model_provider.api.app import create_app
from emb_model_provider.api.protocol import HttpProtocol
from emb_model_provider.errors import SettingsError
from emb_model_provider.observability.logs import start_logging
from emb_model_provider.settings_loading import load_settings

if TYPE_CHECKING:
    from types import FrameType

    from emb_model_provider.settings import ServerSettings, Settings

logger = logging.getLogger("emb_model_provider.main")  # not __name__, which is __main__ here

_FINISH_WITHIN_S = 60
"""How long accepted requests have after SIGTERM; a supervisor's own grace period may be shorter."""
_KEEP_ALIVE_S = 75
"""Longer than the idle limit of the usual proxies and clients, so that they close first."""


def main() -> int:
    """Serve until told to stop; return the process's exit code."""
    try:
        settings, warnings = load_settings()
        _check_address(settings.server())
        listener = start_logging(settings.logs())
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - there is no log yet
        return 1
    try:
        for warning in warnings:
            logger.warning("%s", warning)
        return _serve(settings)
    finally:
        listener.stop()


def _serve(settings: Settings) -> int:
    nothing_to_serve = False

    def stop() -> None:
        nonlocal nothing_to_serve
        nothing_to_serve = True
        server.should_exit = True

    def on_signal(number: int, _: FrameType | None) -> None:
        # Until uvicorn takes the signals over, one ends the process here. Once uvicorn has stopped in good order it
        # sends itself the same signal again, which must not make a clean end look like a killed process.
        if not server.should_exit:
            raise SystemExit(128 + number)

    address = settings.server()
    config = uvicorn.Config(
        create_app(settings, on_nothing_to_serve=stop),
        host=address.host,
        port=address.port,
        log_config=None,
        access_log=False,
        server_header=False,
        http=HttpProtocol,
        # Nothing here is a WebSocket, and a caller's address is only believed as the socket has it.
        ws="none",
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_FINISH_WITHIN_S,
    )
    server = _Server(config)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    # Not `server.run()`, which in the end waits for all threads, even one in the middle of a download.
    new_loop = config.get_loop_factory() or asyncio.new_event_loop
    new_loop().run_until_complete(server.serve())
    return 1 if nothing_to_serve else 0


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        logger.info("%s: finishing the requests that were accepted", signal.Signals(sig).name)
        super().handle_exit(sig, frame)


def _check_address(server: ServerSettings) -> None:
    """Find out that the address cannot be had before a model is loaded, and say so in one line.

    Raises: SettingsError.
    """
    where = f"EMB_PROVIDER_HOST={server.host}, EMB_PROVIDER_PORT={server.port}"
    try:
        addresses = socket.getaddrinfo(
            server.host, server.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as error:
        raise SettingsError(f"{where}: the host is not known here ({error}).") from error
    for family, kind, protocol, _, address in addresses:
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(address)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise SettingsError(
                        f"{where}: something else listens there: stop it, or set another port."
                    ) from error
                raise SettingsError(f"{where}: cannot listen there ({error.strerror}).") from error


def run() -> NoReturn:
    """Serve, then end the process at once: a thread in the middle of a download, which nothing can interrupt, would
    hold up the interpreter's own end for as long as the download takes. The next start goes on with it.
    """
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    run()
