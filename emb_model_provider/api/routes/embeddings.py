"""`POST /v1/embeddings`: parses the request, embeds the inputs, and renders the response."""

from __future__ import annotations

import asyncio
import json
import math
from binascii import b2a_base64
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, cast

import numpy as np
import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from emb_model_provider.api.dependencies import Services, ServicesDep, get_record
from emb_model_provider.api.middleware import cancelled_on_disconnect
from emb_model_provider.api.schemas.openai import EmbeddingRequest, EmbeddingResponse, error_responses
from emb_model_provider.backends.output_types import OUTPUT_TYPES
from emb_model_provider.errors import RequestError
from emb_model_provider.formatting import quote
from emb_model_provider.serving.engine import EmbedOptions
from emb_model_provider.serving.request_options import has_search_prompts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray
    from starlette.types import ASGIApp, Receive, Scope, Send

    from emb_model_provider.backends.output_types import OutputType
    from emb_model_provider.model_spec import Truncate
    from emb_model_provider.observability.metrics import RequestRecord
    from emb_model_provider.serving.results import Embeddings
    from emb_model_provider.settings import LimitSettings

T = TypeVar("T", str, bool, int)

PATH = "/v1/embeddings"

_MAX_INLINE_BODY_BYTES = 256 * 1024
"""Larger request bodies are parsed on a thread, one at a time."""
_MAX_INLINE_NUMBERS = 64 * 1024
"""Responses with more numbers than this are rendered on a thread."""
_MAX_OPTION_CHARACTERS = 10_000
"""Longest value of a field that is a text, in characters. Inputs are not limited by it."""
_MAX_KEYWORD_CHARACTERS = 32
_MAX_INTEGER_DIGITS = 20
"""Digits, with the sign, of the longest 64-bit integer."""
_TYPE_NAMES = {str: "a string", bool: "true, false", int: "an integer"}
_OUTPUT_TYPE_FIELDS: Final = ("output_dtype", "embedding_type", "embedding_types", "encoding_dtype", "embed_dtype")
"""Names of the type of the values, in the APIs of Voyage, Jina, Cohere and vLLM."""
_OUTPUT_TYPE_SYNONYMS: Final[Mapping[str, OutputType]] = {"float32": "float", "dense": "float"}
_FIXED_FIELDS: Final[Mapping[str, tuple[Any, ...]]] = {
    "late_chunking": (False,),
    "return_multivector": (False,),
    "return_dense": (True,),
    "return_sparse": (False,),
    "return_colbert_vecs": (False,),
    "output_type": ("dense",),
    "add_special_tokens": (True,),
    "endianness": ("little", "native"),
}
"""Fields of other APIs that would change the meaning of the response, and the only values that are supported."""
_SIDES: Final[Mapping[str, Truncate]] = {"left": "START", "right": "END"}

router = APIRouter(tags=["embeddings"])


class EmbeddingsFastPath:
    """Middleware that answers `POST /v1/embeddings` itself.

    FastAPI's layers take longer than everything else that is done for a short text (see docs/performance.md). The route
    is declared below for the OpenAPI document.
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
    summary="Create embeddings",
    response_model=EmbeddingResponse,
    responses=error_responses(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{EmbeddingRequest.__name__}"}}},
        }
    },
)
async def create_embeddings(request: Request, services: ServicesDep) -> Response:
    return await create_response(await embed_request(request, services))


@dataclass(frozen=True, slots=True)
class EmbeddingAnswer:
    """A request for embeddings, and its vectors."""

    fields: Mapping[str, Any]
    """The fields of the request, in its own dialect."""
    call: EmbeddingCall
    model: str
    """The requested name, or the alias of the default model."""
    embeddings: Embeddings


async def embed_request(
    request: Request,
    services: Services,
    translate: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda fields: fields,
) -> EmbeddingAnswer:
    """Parse a request and embed its inputs.

    Args:
        request: The request, whose body has not been read.
        services: The parts of the service.
        translate: Returns the fields of `POST /v1/embeddings` that mean the same as those of the request.
    """
    registry, limits = services.registry, services.settings.limits
    body = await request.body()
    record = get_record(request)

    def parse() -> tuple[Mapping[str, Any], EmbeddingCall]:
        fields = parse_object(body)
        return fields, parse_fields(translate(fields), limits)

    async with cancelled_on_disconnect(request):
        fields, call = await services.in_parse_thread(parse) if len(body) > _MAX_INLINE_BODY_BYTES else parse()
        model = call.model if call.model is not None else registry.default_alias
        resolved = await services.models.resolve(model)
        record.model = resolved.alias
        options = call.options
        if resolved.input_type is not None and options.input_type is None:
            options = replace(options, input_type=resolved.input_type)
        async with registry.lease(resolved.alias) as engine:
            if resolved.needs_prompts and not has_search_prompts(engine.description):
                raise registry.not_found(model)
            embeddings = await engine.embed(call.inputs, options)
    _fill_record(record, embeddings)
    return EmbeddingAnswer(fields, call, model, embeddings)


async def create_response(answer: EmbeddingAnswer) -> Response:
    """Return vectors in OpenAI's form."""
    call = answer.call
    return await _respond(
        answer, lambda: render_response(answer.embeddings, call.encoding, answer.model, call.output_type)
    )


async def vectors_response(answer: EmbeddingAnswer, create_body: Callable[[NDArray[np.float32]], Any]) -> Response:
    """Return vectors in the form of another API. The body may contain float32 arrays, which become arrays of numbers."""

    def render() -> bytes:
        vectors = np.ascontiguousarray(answer.embeddings.vectors, dtype=np.float32)
        return orjson.dumps(create_body(vectors), option=orjson.OPT_SERIALIZE_NUMPY)

    return await _respond(answer, render)


async def _respond(answer: EmbeddingAnswer, render: Callable[[], bytes]) -> Response:
    """Return a response whose body `render` creates, on a thread if there are many numbers."""
    embeddings = answer.embeddings
    content = await asyncio.to_thread(render) if embeddings.vectors.size > _MAX_INLINE_NUMBERS else render()
    headers = {"x-truncated-inputs": str(embeddings.truncated)} if embeddings.truncated else None
    return Response(content, media_type="application/json", headers=headers)


@dataclass(frozen=True, slots=True)
class EmbeddingCall:
    """A valid request for embeddings."""

    model: str | None
    """The requested name; None: the default model."""
    inputs: Sequence[str] | Sequence[Sequence[int]]
    """Texts, or rows of token ids."""
    encoding: Literal["float", "base64"]
    options: EmbedOptions
    output_type: OutputType = "float"


def parse_fields(fields: Mapping[str, Any], limits: LimitSettings) -> EmbeddingCall:
    """Check the fields of `POST /v1/embeddings`.

    Pydantic is not used, because it takes longer, and its messages differ from OpenAI's.
    """
    for name in _FIXED_FIELDS.keys() & fields.keys():
        value = fields[name]
        if value is not None and value not in _FIXED_FIELDS[name]:
            raise _unsupported(name, value, ", ".join(map(_as_json, _FIXED_FIELDS[name])))
    output_type, encoding = _output_type(fields)
    return EmbeddingCall(
        model=optional(fields, str, "model"),
        inputs=_inputs(fields, limits),
        encoding=encoding or _encoding(fields),
        output_type=output_type,
        options=EmbedOptions(
            dimensions=_dimensions(fields),
            normalize=optional(fields, bool, "normalize", "normalized"),
            input_type=optional(fields, str, "input_type", "task", "prompt_name", "text_type"),
            instruction=optional(fields, str, "instruction", "instruct"),
            truncate=_truncate(fields),
            truncate_prompt_tokens=optional(fields, int, "truncate_prompt_tokens"),
        ),
    )


def render_response(
    embeddings: Embeddings, encoding: Literal["float", "base64"], model: str, output_type: OutputType = "float"
) -> bytes:
    """Return the response body as JSON. `base64` encodes the bytes of the values, which are little-endian.

    Raises:
        RequestError: The model cannot return this type of values.
    """
    vectors = np.ascontiguousarray(embeddings.as_type(output_type))
    vectors = vectors.astype(vectors.dtype.newbyteorder("<"), copy=False)
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


async def read_fields(request: Request, services: Services) -> Mapping[str, Any]:
    """Return the fields of the JSON object in the body of a request."""
    body = await request.body()
    if len(body) > _MAX_INLINE_BODY_BYTES:
        return await services.in_parse_thread(lambda: parse_object(body))
    return parse_object(body)


def require(fields: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field; raise RequestError if it is absent or null."""
    value = fields.get(name)
    if value is None:
        raise RequestError(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    return value


def parse_object(body: bytes) -> Mapping[str, Any]:
    """Return the fields of a JSON object; raise RequestError if the body is not one."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError:
        fields = _parse_leniently(body)
    if not isinstance(fields, dict):
        raise RequestError("The JSON body of your request must be an object.", code="invalid_json")
    return fields


def _parse_leniently(body: bytes) -> Any:
    """Parse JSON that is valid but that orjson does not accept, such as an escaped lone surrogate."""
    try:
        return json.loads(body, parse_constant=_reject_constant, parse_int=_parse_integer)
    except (ValueError, RecursionError):
        raise RequestError("We could not parse the JSON body of your request.", code="invalid_json") from None


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not valid JSON")


def _parse_integer(digits: str) -> int | float:
    """Parse an integer as orjson does: with more than 64 bits it is a float, and out of a float's range invalid.

    Otherwise a number with thousands of digits would be accepted, and quoted in the error message.
    """
    if len(digits) <= _MAX_INTEGER_DIGITS:
        return int(digits)
    number = float(digits)
    if math.isinf(number):
        raise ValueError("the number is out of range")
    return number


def _inputs(fields: Mapping[str, Any], limits: LimitSettings) -> Sequence[str] | Sequence[Sequence[int]]:
    value = require(fields, "input")
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        supported = "a string, an array of strings, an array of token ids, an array of arrays of token ids"
        raise _unsupported("input", value, supported, code="invalid_type")
    if not value:
        raise _invalid_input("the array is empty, send at least one input")
    types = {type(item) for item in value}
    if types == {int}:
        return [value]
    if len(value) > limits.max_inputs:
        raise RequestError(
            f"'$.input' is invalid: array length must be {limits.max_inputs} or less",
            param="input",
            code="array_too_long",
        )
    if types == {str}:
        if limits.strict_input and "" in value:
            raise _invalid_input("an input is an empty string")
        return cast("list[str]", value)
    if types == {list}:
        if any(not row for row in value):
            raise _invalid_input("an array of token ids is empty")
        if all(type(item) is int for row in value for item in row):
            return cast("list[list[int]]", value)
    if types == {dict}:
        return _texts_of_objects(value, limits)
    raise _invalid_input("all items must be strings, or all token ids, or all arrays of token ids, and not null")


def _texts_of_objects(value: Sequence[Mapping[str, Any]], limits: LimitSettings) -> Sequence[str]:
    """Return the texts of objects as Jina's API has them: `{"text": "..."}`."""
    if any(item.keys() != {"text"} or not isinstance(item["text"], str) for item in value):
        raise _invalid_input('the only supported objects are {"text": "..."}')
    return _inputs({"input": [item["text"] for item in value]}, limits)  # type: ignore[return-value]  # texts stay texts


def _invalid_input(reason: str) -> RequestError:
    return RequestError(f"'$.input' is invalid: {reason}.", param="input", code="invalid_input")


def _encoding(fields: Mapping[str, Any]) -> Literal["float", "base64"]:
    text = optional(fields, str, "encoding_format")
    match _folded(text) if text is not None else "float":
        case "float" | "base64" as encoding:
            return encoding
    raise _unsupported("encoding_format", text, "'float', 'base64'")


def _output_type(fields: Mapping[str, Any]) -> tuple[OutputType, Literal["base64"] | None]:
    """Return the type of the values, and `base64` if it is requested in the place of a type, as in Jina's API."""
    output_type: OutputType | None = None
    encoding: Literal["base64"] | None = None
    for name in _OUTPUT_TYPE_FIELDS:
        value = fields.get(name)
        if value is None:
            continue
        for item in value if isinstance(value, list) and value else (value,):
            text = _folded(item) if isinstance(item, str) else item
            if text == "base64":
                encoding = "base64"
                continue
            kind = _OUTPUT_TYPE_SYNONYMS.get(text, text) if isinstance(text, str) else None
            if kind not in OUTPUT_TYPES:
                code = "invalid_value" if isinstance(item, str) else "invalid_type"
                raise _unsupported(name, value, ", ".join(map(repr, (*OUTPUT_TYPES, "base64"))), code=code)
            if output_type not in (None, kind):
                raise RequestError(f"'{name}' requests a second type of values. Request one type.", param=name)
            output_type = kind
    return output_type or "float", encoding


def _dimensions(fields: Mapping[str, Any]) -> int | None:
    names = ("dimensions", "output_dimension", "output_dimensionality", "truncate_dim")
    value = optional(fields, int, *names)
    if value is not None and value < 1:
        raise _unsupported(_first(fields, *names)[0], value, "1 or more")
    return value


def _truncate(fields: Mapping[str, Any]) -> Truncate | Literal["AUTO"] | None:
    name, value = _first(fields, "truncate", "truncation")
    side = _truncation_side(fields)
    if value is None:
        return side
    if isinstance(value, bool):
        return (side or "AUTO") if value else "NONE"
    supported = "true, false, 'NONE', 'START', 'END'"
    if not isinstance(value, str):
        raise _unsupported(name, value, supported, code="invalid_type")
    match _folded(value):
        case "none":
            return "NONE"
        case "start" | "end" as folded:
            direction: Truncate = "START" if folded == "start" else "END"
            if side not in (None, direction):
                raise RequestError(f"'truncation_side' contradicts '{name}' = {value!r}.", param="truncation_side")
            return direction
    raise _unsupported(name, value, supported)


def _truncation_side(fields: Mapping[str, Any]) -> Truncate | None:
    names = "truncation_side", "truncation_direction"
    text = optional(fields, str, *names)
    if text is not None and _folded(text) not in _SIDES:
        raise _unsupported(_first(fields, *names)[0], text, "'left', 'right'")
    return _SIDES[_folded(text)] if text is not None else None


def _folded(text: str) -> str:
    """Return a keyword in lower case, and a text that is too long for one as it is."""
    return text.lower() if len(text) < _MAX_KEYWORD_CHARACTERS else text


def _as_json(value: object) -> str:
    return repr(value) if isinstance(value, str) else orjson.dumps(value).decode()


def optional(fields: Mapping[str, Any], kind: type[T], *names: str) -> T | None:
    """Return the value of a field that can have several names and must have this type."""
    name, value = _first(fields, *names)
    if isinstance(value, str) and len(value) > _MAX_OPTION_CHARACTERS:
        raise _unsupported(name, value, f"{_TYPE_NAMES[kind]}, of at most {_MAX_OPTION_CHARACTERS} characters")
    if value is None or type(value) is kind:  # not isinstance, because a bool is an int
        return value
    raise _unsupported(name, value, _TYPE_NAMES[kind], code="invalid_type")


def _first(fields: Mapping[str, Any], *names: str) -> tuple[str, Any]:
    """Return the first of a field's names that is present and not null, with its value."""
    for name in names:
        value = fields.get(name)
        if value is not None:
            return name, value
    return names[0], None


def _unsupported(name: str, value: object, supported: str, *, code: str = "invalid_value") -> RequestError:
    return RequestError(
        f"Invalid value for '{name}' = {quote(value)}. Supported values: [{supported}].", param=name, code=code
    )
