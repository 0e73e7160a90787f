"""Error responses: every error that a client sees, in the form of the API that it uses, by default OpenAI's."""

from __future__ import annotations

import difflib
import logging
import math
from typing import TYPE_CHECKING, cast

import orjson
from starlette.responses import Response

from emb_model_provider.api.dependencies import RECORD, get_record
from emb_model_provider.api.paths import dialect_of
from emb_model_provider.error_table import UNEXPECTED, error_info
from emb_model_provider.errors import (
    DeadlineExceededError,
    ModelNotReadyError,
    ProviderError,
    QueueFullError,
    QuotaExceededError,
    ReceiveTimeoutError,
    RequestError,
    RetryLaterError,
    TooManyBatchesError,
)
from emb_model_provider.formatting import quote
from emb_model_provider.observability.logs import request_id

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)

_MAX_RETRY_AFTER_S = 120
"""The OpenAI SDKs do not retry if Retry-After is longer."""
_MAX_QUOTE = 200
"""Longest quotation of what the client sent, in characters."""


class ErrorResponse(Response):
    """An error in OpenAI's form, which is sent in the form of the API that the request belongs to."""

    def __init__(self, status: int, error: Mapping[str, str | None], headers: Mapping[str, str] | None) -> None:
        super().__init__(orjson.dumps({"error": error}), status, headers=headers, media_type="application/json")
        self.message = error["message"] or ""
        self._code = error["code"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (record := scope.get(RECORD)) is not None:
            record.error_code = self._code or ""
        match dialect_of(scope["method"], scope["path"]):
            case "ollama":
                self._set_body({"error": self.message})
            case "tei":
                self._set_body({"error": self.message, "error_type": _tei_error_type(self.status_code)})
            case "cohere":
                self._set_body({"message": self.message})
            case "dashscope":
                request = record.request_id if record is not None else None
                self._set_body({"code": self._code, "message": self.message, "request_id": request})
        await super().__call__(scope, receive, send)

    def _set_body(self, body: Mapping[str, str | None]) -> None:
        self.body = orjson.dumps(body)
        self.headers["content-length"] = str(len(self.body))


def error_response(
    status: int,
    message: str,
    *,
    type: str = "invalid_request_error",  # noqa: A002 - the name in OpenAI's API
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> ErrorResponse:
    """Return an error in OpenAI's form."""
    # A message can quote what the client sent, lone surrogates included, which UTF-8 cannot encode.
    message = message.encode("utf-8", "replace").decode()
    return ErrorResponse(status, {"message": message, "type": type, "param": param, "code": code}, headers)


def response_for(error: BaseException) -> ErrorResponse:
    """Return the response to a request that failed.

    Errors that are not in the table are logged and become a 500 that tells the client only the request id.
    """
    info = error_info(error)
    if info is UNEXPECTED or not isinstance(error, ProviderError):
        # Errors of this package need no traceback, because their message is sufficient.
        traceback = None if isinstance(error, ProviderError) else error
        logger.error("the request failed: %s: %s", type(error).__name__, error, exc_info=traceback)
        message = f"The server failed to process this request. See request id {request_id.get()} in its log."
        return error_response(info.status, message, type="server_error", code=info.code)
    kind = "server_error" if info.status >= 500 else "invalid_request_error"
    param = None
    headers: dict[str, str] = {}
    match error:
        case RequestError():
            param = error.param
        case ReceiveTimeoutError():
            headers["connection"] = "close"  # because it is unknown where the next request would begin
        case QueueFullError() | QuotaExceededError():
            kind = "rate_limit_error"
            headers = retry_after(error.retry_after_s)
        case TooManyBatchesError():
            kind = "rate_limit_error"
            # OpenAI's SDKs would wait for minutes, and then report the same.
            headers = retry_after(error.retry_after_s) | {"x-should-retry": "false"}
        case DeadlineExceededError(can_repeat=False):
            # OpenAI's SDKs repeat a request after any other 5xx, twice by default.
            headers = {"x-should-retry": "false"}
        case ModelNotReadyError():
            param = "model"
            headers = retry_after(error.retry_after_s)
        case RetryLaterError():
            headers = retry_after(error.retry_after_s)
    return error_response(info.status, error.message, type=kind, param=param, code=info.code, headers=headers)


def _tei_error_type(status: int) -> str:
    match status:
        case 429:
            return "Overloaded"
        case 503:
            return "Unhealthy"
    return "Validation" if status < 500 else "Backend"


def retry_after(seconds: float) -> dict[str, str]:
    return {"retry-after": str(min(_MAX_RETRY_AFTER_S, max(1, math.ceil(seconds))))}


async def on_validation_error(request: Request, error: Exception) -> Response:
    """Return the response to a request with invalid query parameters. It names the first of them."""
    problem = cast("RequestValidationError", error).errors()[0]
    name = str(problem["loc"][-1])[:_MAX_QUOTE]
    match problem["type"]:
        case "missing":
            path = request.scope["path"][:_MAX_QUOTE]
            message = f"Missing required parameter: '{name}'. Send it in the query ({path}?{name}=…), or in a JSON object as the body."
            code = "missing_required_parameter"
        case "extra_forbidden":
            message = f"Unknown parameter: '{name}'. /docs lists the parameters of this route."
            code = "unknown_parameter"
        case kind:
            quoted = quote(problem["input"])
            message = f"Invalid value for '{name}' = {quoted}. {problem['msg']}."
            code = "invalid_type" if kind.endswith(("_parsing", "_type")) else "invalid_value"
    return error_response(400, message, param=name, code=code)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Return the response to a request for an unknown path or with a method that its path does not support."""
    exception = cast("HTTPException", error)
    # The record has the method that the client sent: in the scope, HEAD was replaced by GET.
    method = get_record(request).method
    message = f"Invalid URL ({method} {request.scope['path'][:_MAX_QUOTE]})"
    match exception.status_code:
        case 404:
            return error_response(404, f"{message}. {_nearest_route(request)}", code="unknown_url")
        case 405:
            allowed = (exception.headers or {}).get("Allow", "")
            return error_response(
                405,
                f"{message}: {method[:_MAX_QUOTE]} is not a method of this route. Use {allowed}.",
                code="method_not_allowed",
                headers=exception.headers,
            )
        case status:
            return error_response(status, str(exception.detail), headers=exception.headers)


def _nearest_route(request: Request) -> str:
    """Return a sentence that names the route whose path is most similar to that of the request, if there is one."""
    method = get_record(request).method
    routes: Mapping[str, set[str]] = request.app.state.methods
    for path in difflib.get_close_matches(request.scope["path"][:_MAX_QUOTE], routes, n=1):
        return f"Did you mean {method if method in routes[path] else min(routes[path])} {path}?"
    return "/docs lists the routes."
