"""What happens to every request, whatever its route: an id, an access line, the door, the body's limit."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from emb_model_provider.api.errors import response_for, shutting_down_response
from emb_model_provider.api.limits import RECEIVE_TIMED_OUT
from emb_model_provider.errors import BodyTooLargeError, CompressedBodyError, ReceiveTimeoutError
from emb_model_provider.observability.logs import ACCESS_LOGGER, new_request_id, request_id
from emb_model_provider.observability.metrics import RequestRecord

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from emb_model_provider.api.auth import AccessPolicy
    from emb_model_provider.api.limits import BodyBudget


access_logger = logging.getLogger(ACCESS_LOGGER)

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""Asked every few seconds by machines: their access lines are for DEBUG."""
_CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that went away; nobody reads it but the log."""


class AccessLogMiddleware:
    """Gives every request its id, and writes one access line for it when it is answered."""

    def __init__(self, app: ASGIApp, on_request: Callable[[RequestRecord], None]) -> None:
        self._app = app
        self._on_request = on_request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        given = Headers(scope=scope).get("x-request-id", "")
        identifier = given if _SANE_REQUEST_ID.fullmatch(given) else new_request_id()
        encoded = identifier.encode("ascii")
        record = RequestRecord(method=scope["method"], path=scope["path"], request_id=identifier)
        scope["emb_provider.record"] = record
        # Never reset: each request is a task with a context of its own, and what the server logs of it comes later.
        request_id.set(identifier)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", encoded)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            record.duration_s = time.perf_counter() - started
            self._write(record)

    def _write(self, record: RequestRecord) -> None:
        if record.path == "/v1/embeddings" and record.method == "POST":
            self._on_request(record)
        level = logging.DEBUG if record.path in _QUIET_PATHS else logging.INFO
        if not access_logger.isEnabledFor(level):
            return
        fields: dict[str, object] = {"status": record.status, "ms": _milliseconds(record.duration_s)}
        if record.model:
            fields["model"] = record.model
        if record.tokenize_s is not None:
            fields |= {
                "inputs": record.inputs,
                "tokens": record.tokens,
                "queue_ms": _milliseconds(record.queue_s or 0.0),
                "tokenize_ms": _milliseconds(record.tokenize_s),
                "inference_ms": _milliseconds(record.inference_s or 0.0),
            }
        line = " ".join(f"{name}={value}" for name, value in fields.items())
        access_logger.log(level, "%s %s %s", record.method, record.path[:200], line, extra={"fields": fields})


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 2)


class TrustedHostMiddleware:
    """Turns away requests under a name that is not ours, the preflights of browsers included."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy) -> None:
        self._app = app
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._policy.check_host(Headers(scope=scope)) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)


class AuthAndLimitsMiddleware:
    """Turns away who may not call, stops bodies that cannot be read, and answers what nothing else caught."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy, max_body_bytes: int, budget: BodyBudget) -> None:
        self._app = app
        self._policy = policy
        self._max_body_bytes = max_body_bytes
        self._budget = budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        response_started = body_asked_for = False

        async def noting_send(message: Message) -> None:
            nonlocal response_started
            if message["type"] == "http.response.start":
                response_started = True
                if not body_asked_for and "expect" in headers:
                    # Whether the client still sends its body is open, so nobody knows where its next request begins.
                    MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        received = 0

        async def limited_receive() -> Message:
            nonlocal body_asked_for, received
            body_asked_for = True
            message = await receive()
            if message["type"] == "http.request":
                if RECEIVE_TIMED_OUT in client_scope:
                    raise ReceiveTimeoutError("The request's body was not sent in time.")
                size = len(message.get("body", b""))
                self._check_size(received + size)
                self._budget.take(size)
                received += size
            return message

        client_scope = scope
        try:
            refusal = self._policy.authorize(scope, headers)
            if refusal is not None:
                await refusal(scope, receive, noting_send)
                return
            self._check_announced(headers)
            if scope["method"] == "HEAD":
                # The routes know GET. The server sends no body all the same: it looks at its own scope.
                scope = {**scope, "method": "GET"}
            await self._app(scope, limited_receive, noting_send)
        except (ClientDisconnect, ClientDisconnectedError):
            await Response(status_code=_CLIENT_CLOSED_REQUEST)(scope, receive, noting_send)
        except asyncio.CancelledError:
            # The server does this to what is left at the end of the grace period. Unanswered, it would be a 500.
            if response_started:
                raise
            await shutting_down_response()(scope, receive, noting_send)
        except Exception as error:
            if response_started:
                raise
            await response_for(error)(scope, receive, noting_send)
        finally:
            self._budget.give_back(received)

    def _check_announced(self, headers: Headers) -> None:
        length = headers.get("content-length", "")
        size = int(length) if length.isdecimal() else 0
        self._check_size(size)
        self._budget.check(size)
        encoding = headers.get("content-encoding", "identity")
        if encoding.strip().lower() != "identity":
            raise CompressedBodyError(
                f"The request body is compressed (Content-Encoding: {encoding[:50]}): send it as plain JSON."
            )

    def _check_size(self, size: int) -> None:
        if size > self._max_body_bytes:
            raise BodyTooLargeError(
                f"The request body is larger than {self._max_body_bytes / 1024 / 1024:g} MiB: send fewer inputs at a time."
            )


_WATCH_AFTER_S = 0.2
"""Most requests are answered sooner, and need no watcher."""


class ClientDisconnectedError(Exception):
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
            raise ClientDisconnectedError from None
        raise
    finally:
        timer.cancel()
        if watcher is not None:
            watcher.cancel()
