"""What happens to every request, whatever its route: an id, an access line, the door, the body's limit."""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import TYPE_CHECKING

from starlette.datastructures import Headers, MutableHeaders

from emb_model_provider.api.errors import BodyTooLargeError, response_for
from emb_model_provider.observability.logs import request_id
from emb_model_provider.observability.metrics import RequestRecord

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from emb_model_provider.api.auth import Doorkeeper

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("emb_model_provider.access")

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})
"""Asked every few seconds by machines: their access lines are for DEBUG."""


class RequestLog:
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
        identifier = given if _SANE_REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        record = RequestRecord(method=scope["method"], path=scope["path"], request_id=identifier)
        scope["emb_provider.record"] = record
        token = request_id.set(identifier)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = identifier
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            record.duration_s = time.perf_counter() - started
            self._write(record)
            request_id.reset(token)

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


class Guard:
    """Turns away who may not pass, stops bodies that are too large, and answers what nothing else caught."""

    def __init__(self, app: ASGIApp, doorkeeper: Doorkeeper, max_body_bytes: int) -> None:
        self._app = app
        self._doorkeeper = doorkeeper
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._doorkeeper.refusal(scope["path"], headers)
        if refusal is not None:
            await refusal(scope, receive, send)
            return

        started = False

        async def noting_start(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            announced = headers.get("content-length", "")
            self._check_size(int(announced) if announced.isdecimal() else 0)
            await self._app(scope, self._limited(receive), noting_start)
        except Exception as error:
            if started:
                raise
            response = response_for(error)
            if response.status_code == 500:
                logger.exception("%s %s failed", scope["method"], scope["path"])
            await response(scope, receive, send)

    def _limited(self, receive: Receive) -> Receive:
        total = 0

        async def limited() -> Message:
            nonlocal total
            message = await receive()
            if message["type"] == "http.request":
                total += len(message.get("body", b""))
                self._check_size(total)
            return message

        return limited

    def _check_size(self, size: int) -> None:
        if size > self._max_body_bytes:
            raise BodyTooLargeError(
                f"The request body is larger than {self._max_body_bytes / 1024 / 1024:g} MiB: send fewer inputs at a time."
            )
