"""Requests between the workers of one service, over their private sockets.

A follower forwards to the primary every request but those for inference with a model that it has loaded, for `/metrics`
and for `/health`. It forwards them before it has checked anything, with the address of the client, so that access rules,
limits, quotas, the log and the metrics of a forwarded request are those of the primary.
"""

from __future__ import annotations

import asyncio
import json
import logging
import string
from contextlib import suppress
from typing import TYPE_CHECKING
from urllib.parse import quote

from starlette.requests import ClientDisconnect

from emb_model_provider.api.dependencies import REPLAYED
from emb_model_provider.api.errors import response_for
from emb_model_provider.api.paths import is_inference_request
from emb_model_provider.api.worker_sync import SYNC_PATH, WORKER_URL, transport_to
from emb_model_provider.errors import ModelNotReadyError, NotLoadedHereError
from emb_model_provider.observability.logs import new_request_id
from emb_model_provider.workers import PRIMARY

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from emb_model_provider.api.worker_sync import Primary
    from emb_model_provider.workers import Worker

logger = logging.getLogger(__name__)

_LOCAL_PATHS = frozenset({"/health", "/metrics"})
_CLIENT = b"x-emb-worker-client"
"""Header of forwarded requests: the address of the client as JSON. Clients cannot send it, because it is replaced."""
_HOP_BY_HOP = frozenset(
    {b"connection", b"keep-alive", b"transfer-encoding", b"te", b"trailer", b"upgrade", b"expect", _CLIENT}
)
"""Headers that concern one connection only (RFC 9110, 7.6.1)."""
_NOT_RETURNED = _HOP_BY_HOP | {b"date"}
"""Headers of responses that the server of this worker adds itself."""
_ATTEMPTS = 5
"""How often a request for inference is forwarded if the connection ends, because the primary is being restarted."""
_PAUSE_S = 0.2
_RETRY_AFTER_S = 1.0
_VISIBLE = string.digits + string.ascii_letters + string.punctuation


class Forwarding:
    """Middleware of a follower."""

    def __init__(self, app: ASGIApp, worker: Worker, is_shutting_down: Callable[[], bool]) -> None:
        self._app = app
        self._transport = transport_to(worker, PRIMARY)
        self._is_shutting_down = is_shutting_down

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _LOCAL_PATHS:
            await self._app(scope, receive, send)
        elif is_inference_request(scope["method"], scope["path"]):
            await self._infer(scope, receive, send)
        elif not await self._forward(scope, receive, send):
            await _send_error(scope, receive, send)

    async def _infer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, or forward it with the messages that were received until then."""
        kept: list[Message] = []

        async def keep() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                kept.append(message)
            return message

        try:
            await self._app({**scope, REPLAYED: kept}, keep, send)
        except NotLoadedHereError:
            for attempt in range(_ATTEMPTS):
                await asyncio.sleep(_PAUSE_S * attempt)
                if await self._forward(scope, _replay(kept, receive), send):
                    return
            await _send_error(scope, receive, send)

    async def _forward(self, scope: Scope, receive: Receive, send: Send) -> bool:
        """Let the primary answer a request, until the client disconnects; return False if the primary has ended."""
        if self._is_shutting_down():
            return False
        received = asyncio.Event()
        exchange = asyncio.create_task(self._exchange(scope, _body(receive, received), send, received))
        watching = asyncio.create_task(_disconnect(receive, received))
        try:
            await asyncio.wait({exchange, watching}, return_when=asyncio.FIRST_COMPLETED)
            if not exchange.done():
                return True  # there is no client
            with suppress(ClientDisconnect):
                return exchange.result()
            return True
        finally:
            exchange.cancel()
            watching.cancel()
            # The connection to the primary is closed by now or then.
            await asyncio.gather(exchange, watching, return_exceptions=True)

    async def _exchange(self, scope: Scope, body: AsyncIterator[bytes], send: Send, received: asyncio.Event) -> bool:
        import httpx  # here, because a service with one worker does not need it

        names = {name for name, _ in scope["headers"]}
        has_body = b"content-length" in names or b"transfer-encoding" in names
        if not has_body:
            received.set()
        headers = [(name, value) for name, value in scope["headers"] if name not in _HOP_BY_HOP]
        headers.append((_CLIENT, json.dumps(scope.get("client")).encode()))
        # As the client has sent it, except for bytes that are not allowed there.
        target = quote(
            scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b""), safe=_VISIBLE
        )
        request = httpx.Request(
            scope["method"], WORKER_URL, headers=headers, content=body if has_body else None,
            extensions={"target": target.encode()},
        )  # fmt: skip
        try:
            response = await self._transport.handle_async_request(request)
        except httpx.TransportError as error:
            logger.debug("worker %d did not answer: %r", PRIMARY, error)
            return False
        try:
            raw = [(name.lower(), value) for name, value in response.headers.raw if name.lower() not in _NOT_RETURNED]
            await send({"type": "http.response.start", "status": response.status_code, "headers": raw})
            async for piece in response.aiter_raw():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await response.aclose()
        return True


class PrivateApplication:
    """What a worker answers on its private socket: forwarded requests, and the questions of other workers."""

    def __init__(self, app: ASGIApp, live_metrics: Callable[[], Awaitable[str]], primary: Primary | None) -> None:
        """Create it; `live_metrics` returns the metrics that are read at each scrape."""
        self._app = app
        self._live_metrics = live_metrics
        self._primary = primary

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = [value for name, value in scope["headers"] if name == _CLIENT]
        if client:
            address = json.loads(client[0])
            headers = [(name, value) for name, value in scope["headers"] if name != _CLIENT]
            client_address = tuple(address) if address is not None else None
            await self._app({**scope, "headers": headers, "client": client_address}, receive, send)
        elif scope["path"] == SYNC_PATH and self._primary is not None:
            await self._primary.answer(receive, send)
        else:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": (await self._live_metrics()).encode()})


async def _body(receive: Receive, received: asyncio.Event) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            raise ClientDisconnect
        more = message.get("more_body", False)
        if piece := message.get("body"):
            yield piece
    received.set()


async def _disconnect(receive: Receive, received: asyncio.Event) -> None:
    await received.wait()
    while (await receive())["type"] != "http.disconnect":
        pass


def _replay(messages: list[Message], receive: Receive) -> Receive:
    """Return what receives these messages, and then others."""
    left = list(messages)

    async def replay() -> Message:
        return left.pop(0) if left else await receive()

    return replay


async def _send_error(scope: Scope, receive: Receive, send: Send) -> None:
    error = ModelNotReadyError("The service is being restarted. Try again later.", retry_after_s=_RETRY_AFTER_S)
    response = response_for(error)
    response.headers["x-request-id"] = new_request_id()
    await response(scope, receive, send)
