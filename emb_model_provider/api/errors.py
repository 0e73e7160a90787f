"""Every error that a client can see: the one place where a domain error gets its HTTP status."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, cast

import orjson
from starlette.responses import Response

from emb_model_provider.errors import (
    AccessDeniedError,
    AmbiguousNameError,
    CacheNotWritableError,
    CorruptSnapshotError,
    DeadlineExceededError,
    DeviceUnavailableError,
    FetchCancelledError,
    HubError,
    HubUnavailableError,
    IncompleteRepositoryError,
    JobNotFoundError,
    LoadError,
    ManagementError,
    ModelInUseError,
    ModelNotFoundError,
    ModelNotReadyError,
    NotAllowedError,
    NotCachedError,
    OfflineError,
    ProviderError,
    QueueFullError,
    RepositoryNotFoundError,
    RequestError,
    RevisionNotFoundError,
    SettingsError,
    UnsupportedModelError,
    UnsupportedPrecisionError,
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


class BodyTooLargeError(ProviderError):
    """The request's body is over MAX_BODY_MB."""


class CompressedBodyError(ProviderError):
    """The request's body has a Content-Encoding."""


class RequestTimeoutError(ProviderError):
    """The client did not send its whole request within RECEIVE_TIMEOUT_S."""


class AliasInUseError(ProviderError):
    """A model was to get a name that another one has."""


MANAGING: tuple[tuple[type[ProviderError], int, str], ...] = (
    (NotCachedError, 404, "not_cached"),
    (AmbiguousNameError, 400, "ambiguous_name"),
    (JobNotFoundError, 404, "job_not_found"),
    (ModelInUseError, 409, "model_in_use"),
    (AliasInUseError, 409, "alias_in_use"),
    (NotAllowedError, 403, "not_allowed"),
    (SettingsError, 400, "invalid_value"),
    (RepositoryNotFoundError, 404, "repository_not_found"),
    (RevisionNotFoundError, 404, "revision_not_found"),
    (AccessDeniedError, 403, "hub_access_denied"),
    (OfflineError, 403, "offline"),
    (IncompleteRepositoryError, 400, "no_model"),
    (FetchCancelledError, 409, "cancelled"),
    (CacheNotWritableError, 500, "cache_not_writable"),
    (HubUnavailableError, 502, "hub_unavailable"),
    (CorruptSnapshotError, 502, "corrupt_files"),
    (HubError, 502, "hub_error"),
    (UnsupportedModelError, 400, "unsupported_model"),
    (UnsupportedPrecisionError, 400, "unsupported_precision"),
    (DeviceUnavailableError, 400, "device_unavailable"),
    (LoadError, 500, "load_failed"),
    (ManagementError, 500, "cache_not_writable"),
)
"""Errors that only routes below /api/ give, with their statuses and codes; the first that fits counts. What a hub or a
load says is told as it is: whoever may manage models may read it. Elsewhere it is the reason of a 503."""


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
            return error_response(413, error.message, code="request_too_large")
        case CompressedBodyError():
            return error_response(415, error.message, code="unsupported_content_encoding")
        case RequestTimeoutError():
            # Where its next request would begin, nobody knows.
            return error_response(408, error.message, code="request_timeout", headers={"connection": "close"})
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
        case ProviderError() if (known := _managing(error)) is not None:
            status, code = known
            kind = "server_error" if status >= 500 else "invalid_request_error"
            return error_response(status, error.message, type=kind, code=code)
        case _:
            # An error of our own says it all in its message; of others the traceback is wanted.
            trace = None if isinstance(error, ProviderError) else error
            logger.error("the request failed: %s: %s", type(error).__name__, error, exc_info=trace)
            return error_response(
                500,
                f"The server failed on this request. Its log says why under request id {request_id.get()}.",
                type="server_error",
                code="internal_error",
            )


def code_of(error: BaseException) -> str:
    """Return the code of an error that ended a download."""
    known = _managing(error)
    return known[1] if known is not None else "internal_error"


def _managing(error: BaseException) -> tuple[int, str] | None:
    return next(((status, code) for kind, status, code in MANAGING if isinstance(error, kind)), None)


def _retry_after(seconds: float) -> dict[str, str]:
    return {"retry-after": str(min(_LONGEST_RETRY_AFTER_S, max(1, math.ceil(seconds))))}


RETRY_SOON = _retry_after(1)
"""For clients that were turned away before anything was known of their request."""


def given_up() -> Response:
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
