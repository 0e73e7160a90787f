"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import json
import math
from binascii import b2a_base64
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from emb_model_provider.api.dependencies import Services, ServicesDep
from emb_model_provider.api.middleware import cancelled_on_disconnect
from emb_model_provider.api.schemas.openai import EmbeddingRequest, EmbeddingResponse, error_responses
from emb_model_provider.errors import RequestError
from emb_model_provider.serving.engine import EmbedOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starlette.types import ASGIApp, Receive, Scope, Send

    from emb_model_provider.model_spec import Truncate
    from emb_model_provider.observability.metrics import RequestRecord
    from emb_model_provider.serving.engine import Embeddings
    from emb_model_provider.settings import LimitSettings


_INLINE_NUMBERS = 64 * 1024
"""Writing a body with more numbers than this is left to a thread, so that others are answered meanwhile."""
_INLINE_BODY_BYTES = 256 * 1024


PATH = "/v1/embeddings"

router = APIRouter(tags=["embeddings"])


class EmbeddingsFastPath:
    """Middleware that answers `POST /v1/embeddings` itself.

    FastAPI's routing and dependency injection, which that route does not need, take longer than everything else that
    is done for a short text (see docs/performance.md). The route is declared below for the OpenAPI document.
    """

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == PATH and scope["method"] == "POST":
            response = await create_embeddings(Request(scope, receive), self._services)
            await response(scope, receive, send)
        else:
            await self._app(scope, receive, send)


@router.post(
    PATH,
    summary="Turn texts into vectors",
    response_model=EmbeddingResponse,
    responses=error_responses(400, 401, 404, 408, 413, 415, 429, 500, 503, 504),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": f"#/components/schemas/{EmbeddingRequest.__name__}"}}
            },
        }
    },
)
async def create_embeddings(request: Request, services: ServicesDep) -> Response:
    registry, limits = services.registry, services.settings.limits
    body = await request.body()
    record: RequestRecord = request.scope["emb_provider.record"]
    async with cancelled_on_disconnect(request):
        if len(body) > _INLINE_BODY_BYTES:
            call = await asyncio.to_thread(parse_embedding_call, body, limits)
        else:
            call = parse_embedding_call(body, limits)
        model = call.model if call.model is not None else registry.default_alias
        record.model = registry.alias_of(model)
        async with registry.lease(record.model) as engine:
            embeddings = await engine.embed(call.inputs, call.options)
    _fill_record(record, embeddings)
    if embeddings.vectors.size > _INLINE_NUMBERS:
        content = await asyncio.to_thread(render_response, embeddings, call.encoding, model)
    else:
        content = render_response(embeddings, call.encoding, model)
    headers = {"x-truncated-inputs": str(embeddings.truncated)} if embeddings.truncated else None
    return Response(content, media_type="application/json", headers=headers)


def render_response(embeddings: Embeddings, encoding: Literal["float", "base64"], model: str) -> bytes:
    """Return the response's body."""
    vectors = np.ascontiguousarray(embeddings.vectors, dtype="<f4")
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": vector if encoding == "float" else b2a_base64(vector, newline=False).decode("ascii"),
        }
        for index, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": embeddings.tokens, "total_tokens": embeddings.tokens}
    body = {"object": "list", "data": data, "model": model, "usage": usage}
    return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def _fill_record(record: RequestRecord, embeddings: Embeddings) -> None:
    record.inputs = len(embeddings.vectors)
    record.tokens = embeddings.tokens
    record.tokenize_s = embeddings.tokenize_s
    record.queue_s = embeddings.timing.queue_s
    record.inference_s = embeddings.timing.inference_s


_LONGEST_QUOTE = 100
_LONGEST_WHOLE_NUMBER = 20
"""In digits: 64 bits have no more."""


@dataclass(frozen=True, slots=True)
class EmbeddingCall:
    """A valid request for embeddings."""

    model: str | None
    inputs: Sequence[str] | Sequence[Sequence[int]]
    encoding: Literal["float", "base64"]
    options: EmbedOptions


def parse_embedding_call(body: bytes, limits: LimitSettings) -> EmbeddingCall:
    """Read the body of `POST /v1/embeddings`.

    Raises: RequestError with the contract's code and the field at fault.
    """
    fields = _parsed_object(body)
    return EmbeddingCall(
        model=_text(fields, "model"),
        inputs=_inputs(fields, limits),
        encoding=_encoding(fields),
        options=EmbedOptions(
            dimensions=_dimensions(fields),
            normalize=_boolean(fields, "normalize", "normalized"),
            input_type=_text(fields, "input_type", "task", "prompt_name"),
            truncate=_truncate(fields),
            truncate_prompt_tokens=_integer(fields, "truncate_prompt_tokens")[1],
        ),
    )


def _parsed_object(body: bytes) -> Mapping[str, Any]:
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        fields = _parsed_leniently(body)
    if not isinstance(fields, dict):
        raise RequestError("The JSON body of your request must be an object.", code="invalid_json")
    return fields


def _parsed_leniently(body: bytes) -> Any:
    """Parse what orjson refuses but JSON allows, such as an escaped lone surrogate."""
    try:
        return json.loads(body, parse_constant=_refuse_constant, parse_int=_whole_number)
    except (ValueError, RecursionError):
        raise RequestError("We could not parse the JSON body of your request.", code="invalid_json") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _whole_number(digits: str) -> int | float:
    """Read a number as orjson does: one of more than 64 bits is a float, and what no float holds is refused.

    Else a number of thousands of digits would come through, and back in the message that refuses it.
    """
    if len(digits) <= _LONGEST_WHOLE_NUMBER:
        return int(digits)
    number = float(digits)
    if math.isinf(number):
        raise ValueError("the number is out of range")
    return number


# --- input --------------------------------------------------------------------------------------------


def _inputs(fields: Mapping[str, Any], limits: LimitSettings) -> Sequence[str] | Sequence[Sequence[int]]:
    given = fields.get("input")
    if given is None:
        raise RequestError(
            "Missing required parameter: 'input'.", param="input", code="missing_required_parameter"
        )
    if isinstance(given, str):
        given = [given]
    if not isinstance(given, list):
        raise RequestError(
            f"Invalid value for 'input' = {_quoted(given)}. "
            "Supported values: [a string, an array of strings, an array of token ids, an array of such arrays].",
            param="input",
            code="invalid_type",
        )
    if not given:
        raise _invalid_input("the array is empty: send at least one input")
    kinds = {type(item) for item in given}
    if kinds == {int}:
        return [given]
    if len(given) > limits.max_inputs:
        raise RequestError(
            f"'$.input' is invalid: array length must be {limits.max_inputs} or less",
            param="input",
            code="array_too_long",
        )
    if kinds == {str}:
        if limits.strict_input and "" in given:
            raise _invalid_input("an input is an empty string")
        return cast("list[str]", given)
    if kinds == {list}:
        if any(not row for row in given):
            raise _invalid_input("an array of token ids is empty")
        if all(type(item) is int for row in given for item in row):
            return cast("list[list[int]]", given)
    raise _invalid_input(
        "all items must be strings, or all token ids, or all arrays of token ids, and none null"
    )


def _invalid_input(reason: str) -> RequestError:
    return RequestError(f"'$.input' is invalid: {reason}.", param="input", code="invalid_input")


# --- the other fields ---------------------------------------------------------------------------------


def _encoding(fields: Mapping[str, Any]) -> Literal["float", "base64"]:
    text = _text(fields, "encoding_format")
    match text.lower() if text is not None else "float":
        case "float":
            return "float"
        case "base64":
            return "base64"
    raise _unsupported("encoding_format", text, "'float', 'base64'")


def _dimensions(fields: Mapping[str, Any]) -> int | None:
    name, value = _integer(fields, "dimensions", "output_dimension")
    if value is not None and value < 1:
        raise _unsupported(name, value, "1 or more")
    return value


def _truncate(fields: Mapping[str, Any]) -> Truncate | None:
    name, value = _first(fields, "truncate", "truncation")
    if value is None:
        return None
    if isinstance(value, bool):
        return "END" if value else "NONE"
    supported = "true, false, 'NONE', 'START', 'END'"
    if not isinstance(value, str):
        raise _unsupported(name, value, supported, code="invalid_type")
    match value.upper():
        case "NONE" | "START" | "END" as direction:
            return direction
    raise _unsupported(name, value, supported)


def _first(fields: Mapping[str, Any], *names: str) -> tuple[str, Any]:
    """Return the first of a field's names that is there and not null, and its value."""
    for name in names:
        value = fields.get(name)
        if value is not None:
            return name, value
    return names[0], None


def _text(fields: Mapping[str, Any], *names: str) -> str | None:
    name, value = _first(fields, *names)
    if value is None or isinstance(value, str):
        return value
    raise _unsupported(name, value, "a string", code="invalid_type")


def _boolean(fields: Mapping[str, Any], *names: str) -> bool | None:
    name, value = _first(fields, *names)
    if value is None or isinstance(value, bool):
        return value
    raise _unsupported(name, value, "true, false", code="invalid_type")


def _integer(fields: Mapping[str, Any], *names: str) -> tuple[str, int | None]:
    name, value = _first(fields, *names)
    if value is None or type(value) is int:
        return name, value
    raise _unsupported(name, value, "a whole number", code="invalid_type")


def _unsupported(name: str, value: object, supported: str, *, code: str = "invalid_value") -> RequestError:
    return RequestError(
        f"Invalid value for '{name}' = {_quoted(value)}. Supported values: [{supported}].",
        param=name,
        code=code,
    )


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}…"
