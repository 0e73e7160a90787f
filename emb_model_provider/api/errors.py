"""Every error that a client can see: the one place where a domain error gets its HTTP status."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import orjson
from starlette.responses import Response

from emb_model_provider.errors import (
    DeadlineExceededError,
    ModelNotFoundError,
    ModelNotReadyError,
    ProviderError,
    QueueFullError,
    RequestError,
)
from emb_model_provider.observability.logs import request_id

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.exceptions import HTTPException
    from starlette.requests import Request

_LONGEST_RETRY_AFTER_S = 120
"""The OpenAI SDKs give up on a longer one."""


class BodyTooLargeError(ProviderError):
    """The request's body is over MAX_BODY_MB."""


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
    """Return the answer to a request that ended in `error`. What is not ours to tell becomes a plain 500."""
    match error:
        case ModelNotFoundError():
            return error_response(404, error.message, param=error.param, code=error.code)
        case RequestError():
            return error_response(400, error.message, param=error.param, code=error.code)
        case BodyTooLargeError():
            return error_response(
                413, error.message, code="request_too_large", headers={"connection": "close"}
            )
        case QueueFullError():
            return error_response(
                429,
                error.message,
                type="rate_limit_error",
                code="queue_full",
                headers=_retry_after(error.retry_after_s),
            )
        case ModelNotReadyError():
            return error_response(
                503, error.message, type="server_error", param="model", code="model_not_ready",
                headers=_retry_after(error.retry_after_s),
            )  # fmt: skip
        case DeadlineExceededError():
            return error_response(504, error.message, type="server_error", code="timeout")
        case _:
            return error_response(
                500,
                f"The server failed on this request. Its log says why under request id {request_id.get()}.",
                type="server_error",
                code="internal_error",
            )


def _retry_after(seconds: float) -> dict[str, str]:
    return {"retry-after": str(min(_LONGEST_RETRY_AFTER_S, max(1, math.ceil(seconds))))}


def unauthorized(message: str) -> Response:
    return error_response(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})


async def on_provider_error(_: Request, error: Exception) -> Response:
    return response_for(error)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Answer unknown routes and methods, which the router raises."""
    exception: HTTPException | Any = error
    message = f"Invalid URL ({request.method} {request.url.path})"
    if exception.status_code == 404:
        return error_response(404, message, code="unknown_url")
    if exception.status_code == 405:
        return error_response(405, message, code="method_not_allowed", headers=exception.headers)
    return error_response(exception.status_code, str(exception.detail), headers=exception.headers)
