"""`python -m emb_model_provider.main`: the service, from settings to a clean end."""

from __future__ import annotations

import errno
import logging
import socket
import sys
from typing import TYPE_CHECKING

import uvicorn

from emb_model_provider.api.app import create_app
from emb_model_provider.errors import SettingsError
from emb_model_provider.observability.logs import start_logging
from emb_model_provider.settings_loading import load_settings

if TYPE_CHECKING:
    from emb_model_provider.settings import ServerSettings, Settings

logger = logging.getLogger(__name__)

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

    address = settings.server()
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(settings, on_nothing_to_serve=stop),
            host=address.host,
            port=address.port,
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_FINISH_WITHIN_S,
        )
    )
    server.run()
    return 1 if nothing_to_serve else 0


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


if __name__ == "__main__":
    sys.exit(main())
