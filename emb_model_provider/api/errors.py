"""Error responses: every error that a client sees, in OpenAI's form."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, cast

import orjson
from starlette.responses import Response

from emb_model_provider.api.dependencies import get_record
from emb_model_provider.error_table import UNEXPECTED, error_info
from emb_model_provider.errors import (
    ModelNotReadyError,
    ProviderError,
    QueueFullError,
    ReceiveTimeoutError,
    RequestError,
)
from emb_model_provider.observability.logs import request_id

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException
    from starlette.requests import Request

logger = logging.getLogger(__name__)

_MAX_RETRY_AFTER_S = 120
"""The OpenAI SDKs do not retry if Retry-After is longer."""
_MAX_QUOTE = 200
"""Longest quotation of what the client sent, in characters."""


def error_response(
    status: int,
    message: str,
    *,
    type: str = "invalid_request_error",  # noqa: A002 - the name in OpenAI's API
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return an error in OpenAI's form."""
    # A message can quote what the client sent, lone surrogates included, which UTF-8 cannot encode.
    message = message.encode("utf-8", "replace").decode()
    body = {"error": {"message": message, "type": type, "param": param, "code": code}}
    return Response(orjson.dumps(body), status, headers=headers, media_type="application/json")


def response_for(error: Exception) -> Response:
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
        case QueueFullError():
            kind = "rate_limit_error"
            headers = retry_after(error.retry_after_s)
        case ModelNotReadyError():
            param = "model"
            headers = retry_after(error.retry_after_s)
    return error_response(info.status, error.message, type=kind, param=param, code=info.code, headers=headers)


def retry_after(seconds: float) -> dict[str, str]:
    return {"retry-after": str(min(_MAX_RETRY_AFTER_S, max(1, math.ceil(seconds))))}


async def on_validation_error(request: Request, error: Exception) -> Response:
    """Return the response to a request with invalid query parameters. It names the first of them."""
    problem = cast("RequestValidationError", error).errors()[0]
    name = str(problem["loc"][-1])[:_MAX_QUOTE]
    match problem["type"]:
        case "missing":
            path = request.scope["path"][:_MAX_QUOTE]
            message = f"Missing required parameter: '{name}'. Send it in the query: {path}?{name}=…"
            code = "missing_required_parameter"
        case "extra_forbidden":
            message = f"Unknown parameter: '{name}'. /docs lists the parameters of this route."
            code = "unknown_parameter"
        case kind:
            quoted = repr(problem["input"])[:_MAX_QUOTE]
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
            return error_response(404, message, code="unknown_url")
        case 405:
            return error_response(405, message, code="method_not_allowed", headers=exception.headers)
        case status:
            return error_response(status, str(exception.detail), headers=exception.headers)
