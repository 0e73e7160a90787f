"""Middleware for all routes: request ids and access log, allowed hosts, access control, limits, and error responses."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from typing import TYPE_CHECKING, cast

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from emb_model_provider.api.compression import decompressed
from emb_model_provider.api.dependencies import RECORD
from emb_model_provider.api.errors import response_for
from emb_model_provider.api.limits import RECEIVE_TIMED_OUT, JsonValueCounter, max_json_values
from emb_model_provider.api.paths import is_admin_path, is_inference_request, is_upload
from emb_model_provider.errors import (
    BodyTooLargeError,
    ModelNotReadyError,
    NotLoadedHereError,
    ReceiveTimeoutError,
    is_failure,
)
from emb_model_provider.formatting import format_size
from emb_model_provider.observability.logs import log_request, new_request_id, request_id
from emb_model_provider.observability.metrics import RequestRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from emb_model_provider.api.auth import AccessPolicy
    from emb_model_provider.api.limits import BodyBudget
    from emb_model_provider.api.quotas import Quotas
    from emb_model_provider.observability.tracing import Tracing
    from emb_model_provider.settings import LimitSettings

_VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_MONITORING_PATHS = frozenset(
    {"/health", "/ready", "/metrics", "/console/live", "/console/models/state", "/console/batches/list"}
)
"""Requests for these are logged at DEBUG, because monitoring and the console send them every few seconds."""
_CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a request whose client disconnected. Only the access log shows it."""
_MAX_ADMIN_BODY_BYTES = 1024**2
"""Largest body of a route for management. Their parameters are in the query."""
_MAX_FORM_BYTES = 1024**2
"""What the form of an upload may have besides its file: boundaries, headers and fields."""
_WATCH_AFTER_S = 0.2
"""Most requests are answered sooner, and are not watched for a disconnect."""


class AccessLogMiddleware:
    """Assigns each request an id, and writes one line to the access log when it has been answered."""

    def __init__(self, app: ASGIApp, on_request: Callable[[RequestRecord], None]) -> None:
        self._app = app
        self._on_request = on_request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        identifier = Headers(scope=scope).get("x-request-id", "")
        if not _VALID_REQUEST_ID.fullmatch(identifier):
            identifier = new_request_id()
        encoded = identifier.encode("ascii")
        record = RequestRecord(method=scope["method"], path=scope["path"], request_id=identifier)
        scope[RECORD] = record
        # Never reset, because uvicorn may log about the request after this. Each request is a task with its own context.
        request_id.set(identifier)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", encoded)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except NotLoadedHereError:
            record.is_forwarded = True  # the worker that answers the request records it
            raise
        finally:
            record.duration_s = time.perf_counter() - started
            if not record.is_forwarded:
                self._write(record)

    def _write(self, record: RequestRecord) -> None:
        if is_inference_request(record.method, record.path):
            self._on_request(record)
        level = logging.DEBUG if record.path in _MONITORING_PATHS else logging.INFO
        log_request(record, level)


class TracingMiddleware:
    """Creates a span for each request, except for those of monitoring. Within AccessLogMiddleware."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _MONITORING_PATHS:
            await self._app(scope, receive, send)
            return
        route = scope["path"] if is_inference_request(scope["method"], scope["path"]) else ""
        with self._tracing.request(scope[RECORD], route, Headers(scope=scope)):
            await self._app(scope, receive, send)


class TrustedHostMiddleware:
    """Rejects requests, CORS preflights included, whose Host header is not allowed."""

    def __init__(self, app: ASGIApp, policy: AccessPolicy) -> None:
        self._app = app
        self._policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._policy.check_host(Headers(scope=scope)) if scope["type"] == "http" else None
        await (refusal or self._app)(scope, receive, send)


class AuthAndLimitsMiddleware:
    """Checks access and the size of request bodies, and turns exceptions into error responses."""

    def __init__(
        self,
        app: ASGIApp,
        policy: AccessPolicy,
        limits: LimitSettings,
        budget: BodyBudget,
        quotas: Quotas,
        max_file_bytes: int,
    ) -> None:
        self._app = app
        self._policy = policy
        self._quotas = quotas
        self._max_body_bytes = limits.max_body_bytes
        self._max_file_bytes = max_file_bytes
        self._max_json_values = max_json_values(limits)
        self._budget = budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        max_bytes = self._max_body_bytes
        if is_admin_path(scope["path"]):
            max_bytes = min(max_bytes, _MAX_ADMIN_BODY_BYTES)
        # Written to disk while it arrives, and never parsed as JSON.
        is_file = is_upload(scope["method"], scope["path"])
        received_bytes = file_bytes = 0
        values = JsonValueCounter(self._max_json_values)
        body_requested = response_started = False

        async def checked_receive() -> Message:
            nonlocal body_requested
            body_requested = True
            message = await receive()
            if message["type"] == "http.request" and RECEIVE_TIMED_OUT in scope:
                raise ReceiveTimeoutError("The request body was not sent in time.")
            return message

        async def limited_receive() -> Message:
            nonlocal received_bytes, file_bytes
            message = await receive_body()
            if message["type"] == "http.request" and is_file:
                file_bytes += len(message.get("body", b""))
                check_file_size(file_bytes - _MAX_FORM_BYTES, self._max_file_bytes)
            elif message["type"] == "http.request":
                piece = message.get("body", b"")
                size = len(piece)
                _check_size(received_bytes + size, max_bytes)
                self._budget.reserve(size)
                received_bytes += size
                values.add(piece)
            return message

        async def tracked_send(message: Message) -> None:
            nonlocal response_started
            if message["type"] == "http.response.start":
                response_started = True
                if not body_requested and "expect" in headers:
                    # It is unknown whether the client sends its body now, and thus where its next request begins.
                    MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        try:
            refusal = self._policy.authorize(scope, headers)
            if refusal is not None:
                await refusal(scope, receive, tracked_send)
                return
            record: RequestRecord = scope[RECORD]
            if self._policy.names_keys:
                record.key_name = self._policy.key_name(headers)
                if is_inference_request(scope["method"], scope["path"]):
                    self._quotas.check(record.key_name)
            self._check_headers(headers, max_bytes, is_file=is_file)
            # The size of the decompressed body counts, because that is what takes memory.
            receive_body = decompressed(headers.get("content-encoding", "identity"), checked_receive)
            # Routes accept GET only. The server still sends no body, because it looks at the original scope.
            inner_scope = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
            await self._app(inner_scope, limited_receive, tracked_send)
        except NotLoadedHereError:
            raise  # which forwards the request
        except ClientDisconnect:
            await Response(status_code=_CLIENT_CLOSED_REQUEST)(scope, receive, tracked_send)
        except asyncio.CancelledError:
            # The server cancels the remaining requests at the end of the grace period, and would answer with a 500.
            if response_started:
                raise
            error = ModelNotReadyError(
                "The service is shutting down and did not finish this request. Try again later.", retry_after_s=1
            )
            response = response_for(error)
            response.headers["connection"] = "close"
            await response(scope, receive, tracked_send)
        except BaseException as error:
            if response_started or not is_failure(error):
                raise
            await response_for(error)(scope, receive, tracked_send)
        finally:
            self._budget.release(received_bytes)

    def _check_headers(self, headers: Headers, max_bytes: int, *, is_file: bool) -> None:
        # Without leading zeros, of which there can be thousands. More than 20 digits are too large for any limit.
        length = headers.get("content-length", "").lstrip("0")
        size = int(length[:20]) if length.isdecimal() else 0
        if is_file:
            check_file_size(size - _MAX_FORM_BYTES, self._max_file_bytes)
            return
        _check_size(size, max_bytes)
        self._budget.check(size)


def check_file_size(size: int, max_bytes: int) -> None:
    """Raise BodyTooLargeError if an uploaded file has too many bytes."""
    if size > max_bytes:
        raise BodyTooLargeError(
            f"The file is larger than {format_size(max_bytes)} (EMB_PROVIDER_MAX_FILE_BYTES). Divide it into several files, "
            "and create a batch for each."
        )


def _check_size(size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise BodyTooLargeError(
            f"The request body is larger than {format_size(max_bytes)}. Send fewer inputs per request."
        )


class cancelled_on_disconnect:  # noqa: N801 - used like a function: `async with cancelled_on_disconnect(request)`
    """Cancel the block and raise ClientDisconnect if the client disconnects. The body must have been read before."""

    __slots__ = ("_is_disconnected", "_request", "_task", "_timer", "_watcher")

    def __init__(self, request: Request) -> None:
        self._request = request
        self._is_disconnected = False
        self._watcher: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        self._task = cast("asyncio.Task[object]", asyncio.current_task())
        self._timer = asyncio.get_running_loop().call_later(_WATCH_AFTER_S, self._start_watching)

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        # Another cancellation, such as that of a shutdown, is passed on.
        if isinstance(error, asyncio.CancelledError) and self._is_disconnected and self._task.uncancel() == 0:
            raise ClientDisconnect from None

    def _start_watching(self) -> None:
        self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self._is_disconnected = True
        self._task.cancel()
