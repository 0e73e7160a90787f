"""Answers that come piece by piece, at the level of one connection."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.server import ServerState

from emb_model_provider.api.http_protocol import HttpProtocol
from emb_model_provider.api.limits import CONNECTIONS, ConnectionLimiter
from emb_model_provider.settings import LimitSettings

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send


async def test_last_piece_is_sent_though_the_service_stops_at_that_moment() -> None:
    """A stop that comes between an answer's end and its last write closes the connection after it, not before."""
    state = ServerState()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"one", "more_body": True})
        await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b""})
        for connection in list(state.connections):
            connection.shutdown()

    config = uvicorn.Config(app, http=HttpProtocol, log_config=None, lifespan="off")
    config.load()
    shared = {CONNECTIONS: ConnectionLimiter(LimitSettings())}
    server = await asyncio.get_running_loop().create_server(
        lambda: HttpProtocol(config=config, server_state=state, app_state=shared), "127.0.0.1", 0
    )
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
        received = await reader.read()
        writer.close()
        await writer.wait_closed()
    assert received.endswith(b"\r\n\r\n3\r\none\r\n0\r\n\r\n")
