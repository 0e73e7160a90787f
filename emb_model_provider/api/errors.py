"""Every error that a client can see: the one place where a domain error gets its HTTP status."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, cast

import orjson
from starlette.responses import Response

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

_LONGEST_RETRY_AFTER_S = 120
"""The OpenAI SDKs give up on a longer one."""


_LONGEST_QUOTED_PATH = 200

logger = logging.getLogger(__name__)


def error_response(
    status: int,
    message: str,
    *,
    type: str = "invalid_request_error",  # noqa: A002 - the wire's own name
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return an error in OpenAI's form."""
    body = {"error": {"message": message, "type": type, "param": param, "code": code}}
    # A message may quote what the client sent, lone surrogates included, which no UTF-8 can carry.
    body["error"]["message"] = message.encode("utf-8", "replace").decode()
    return Response(orjson.dumps(body), status, headers=headers, media_type="application/json")


def response_for(error: Exception) -> Response:
    """Return the response to a request that failed. An error that is not in the table becomes a plain 500."""
    info = error_info(error)
    if info is UNEXPECTED or not isinstance(error, ProviderError):
        # The message of an error of this package is enough; of any other error the traceback is needed.
        trace = None if isinstance(error, ProviderError) else error
        logger.error("the request failed: %s: %s", type(error).__name__, error, exc_info=trace)
        message = f"The server failed on this request. Its log says why under request id {request_id.get()}."
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
            headers = _retry_after(error.retry_after_s)
        case ModelNotReadyError():
            param = "model"
            headers = _retry_after(error.retry_after_s)
    return error_response(
        info.status, error.message, type=kind, param=param, code=info.code, headers=headers or None
    )


def _retry_after(seconds: float) -> dict[str, str]:
    return {"retry-after": str(min(_LONGEST_RETRY_AFTER_S, max(1, math.ceil(seconds))))}


RETRY_SOON = _retry_after(1)
"""For clients that were turned away before anything was known of their request."""


def shutting_down_response() -> Response:
    """Return the answer to a request whose work was cancelled, as happens at the end of the grace period."""
    return error_response(
        503,
        "The service is stopping and gave this request up: ask again.",
        type="server_error",
        param="model",
        code="model_not_ready",
        headers={**RETRY_SOON, "connection": "close"},
    )


def unauthorized(message: str) -> Response:
    return error_response(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


async def on_provider_error(_: Request, error: Exception) -> Response:
    return response_for(error)


async def on_invalid_parameters(request: Request, error: Exception) -> Response:
    """Answer a query that is not as its route describes it. Of several faults the first is told."""
    fault = cast("RequestValidationError", error).errors()[0]
    name = str(fault["loc"][-1])[:_LONGEST_QUOTED_PATH]
    match fault["type"]:
        case "missing":
            where = request.scope["path"][:_LONGEST_QUOTED_PATH]
            message = f"Missing required parameter: '{name}'. Send it in the query: {where}?{name}=…"
            code = "missing_required_parameter"
        case "extra_forbidden":
            message = f"Unknown parameter: '{name}'. /docs lists those of this route."
            code = "unknown_parameter"
        case kind:
            quoted = repr(fault["input"])[:_LONGEST_QUOTED_PATH]
            message = f"Invalid value for '{name}' = {quoted}. {fault['msg']}."
            code = "invalid_type" if kind.endswith(("_parsing", "_type")) else "invalid_value"
    return error_response(400, message, param=name, code=code)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Answer unknown routes and methods, which the router raises."""
    exception = cast("HTTPException", error)
    # The record has the method that was sent: a HEAD comes here as a GET.
    method = request.scope["emb_provider.record"].method
    message = f"Invalid URL ({method} {request.scope['path'][:_LONGEST_QUOTED_PATH]})"
    match exception.status_code:
        case 404:
            return error_response(404, message, code="unknown_url")
        case 405:
            return error_response(405, message, code="method_not_allowed", headers=exception.headers)
        case status:
            return error_response(status, str(exception.detail), headers=exception.headers)
