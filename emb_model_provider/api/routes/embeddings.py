"""`POST /v1/embeddings`: parses the request, embeds the inputs, and renders the response."""

from __future__ import annotations

import asyncio
import json
from binascii import b2a_base64
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import numpy as np
import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from emb_model_provider.api.dependencies import Services, ServicesDep, fill_record, get_record, use_model
from emb_model_provider.api.fields import (
    MAX_INLINE_BODY_BYTES,
    count,
    first,
    folded,
    optional,
    parse_object,
    require,
    unsupported_value,
)
from emb_model_provider.api.middleware import cancelled_on_disconnect
from emb_model_provider.api.schemas.openai import EmbeddingRequest, EmbeddingResponse, error_responses, request_body
from emb_model_provider.backends.output_types import OUTPUT_TYPES
from emb_model_provider.errors import RequestError
from emb_model_provider.serving.engine import EmbedOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from starlette.types import ASGIApp, Receive, Scope, Send

    from emb_model_provider.backends.base import OutputName
    from emb_model_provider.backends.output_types import OutputType
    from emb_model_provider.model_spec import RequestDefaults, Truncate
    from emb_model_provider.serving.results import Embeddings, Measured
    from emb_model_provider.settings import LimitSettings

PATH = "/v1/embeddings"

_MAX_INLINE_NUMBERS = 64 * 1024
"""Responses with more numbers than this are rendered on a thread."""
_OUTPUT_TYPE_FIELDS: Final = ("output_dtype", "embedding_type", "embedding_types", "encoding_dtype", "embed_dtype")
"""Names of the type of the values, in the APIs of Voyage, Jina, Cohere and vLLM."""
_OUTPUT_TYPE_SYNONYMS: Final[Mapping[str, OutputType]] = {"float32": "float", "dense": "float"}
_OTHER_OUTPUTS: Final[Mapping[str, OutputName]] = {"sparse": "sparse", "multi_vector": "multi_vector"}
_OUTPUT_FLAGS: Final[Mapping[str, OutputName]] = {
    "return_dense": "dense",
    "return_sparse": "sparse",
    "return_colbert_vecs": "multi_vector",
}
"""Fields of FlagEmbedding that request an output."""
_FIXED_FIELDS: Final[Mapping[str, tuple[Any, ...]]] = {
    "late_chunking": (False,),
    "return_multivector": (False,),
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
    openapi_extra=request_body(EmbeddingRequest),
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
    fields: Mapping[str, Any] | None = None,
) -> EmbeddingAnswer:
    """Parse a request and embed its inputs.

    Args:
        request: The request.
        services: The parts of the service.
        translate: Returns the fields of `POST /v1/embeddings` that mean the same as those of the request.
        fields: The fields of the body. None: it has not been read.
    """
    limits = services.settings.limits
    body = await request.body()

    def parse() -> tuple[Mapping[str, Any], EmbeddingCall]:
        parsed = parse_object(body) if fields is None else fields
        return parsed, parse_fields(translate(parsed), limits)

    async with cancelled_on_disconnect(request):
        sent, call = await services.in_parse_thread(parse) if len(body) > MAX_INLINE_BODY_BYTES else parse()
        async with use_model(request, services, call.model) as model:
            embeddings = await model.engine.embed(call.inputs, call.options_for(model.defaults))
    fill_record(get_record(request), len(call.inputs), embeddings)
    return EmbeddingAnswer(sent, call, model.name, embeddings)


async def create_response(answer: EmbeddingAnswer) -> Response:
    """Return vectors in OpenAI's form."""
    call, embeddings = answer.call, answer.embeddings
    return await _respond(
        lambda: render_response(embeddings, call.encoding, answer.model, call.output_type),
        embeddings,
        is_large=embeddings.size > _MAX_INLINE_NUMBERS,
    )


async def vectors_response(answer: EmbeddingAnswer, create_body: Callable[[NDArray[np.float32]], Any]) -> Response:
    """Return dense vectors in the form of another API. The body may contain them, or parts of them."""
    vectors = np.ascontiguousarray(answer.embeddings.vectors, dtype=np.float32)
    return await embeddings_response(answer, lambda: create_body(vectors))


async def embeddings_response(answer: EmbeddingAnswer, create_body: Callable[[], Any]) -> Response:
    """Return embeddings in the form of another API. Arrays in the body become arrays of numbers."""
    embeddings = answer.embeddings
    return await json_response(create_body, embeddings, is_large=embeddings.size > _MAX_INLINE_NUMBERS)


async def json_response(create_body: Callable[[], Any], measured: Measured, *, is_large: bool = False) -> Response:
    """Return a response with a body that may contain arrays. It is created on a thread if it is large."""

    def render() -> bytes:
        body = create_body()
        try:
            return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        except TypeError:  # it quotes a text with a lone surrogate, which UTF-8 cannot encode
            return json.dumps(body, default=lambda array: array.tolist()).encode()

    return await _respond(render, measured, is_large=is_large)


async def _respond(render: Callable[[], bytes], measured: Measured, *, is_large: bool) -> Response:
    content = await asyncio.to_thread(render) if is_large else render()
    headers = {"x-truncated-inputs": str(measured.truncated)} if measured.truncated else None
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

    def options_for(self, defaults: RequestDefaults) -> EmbedOptions:
        """Return the options, with the defaults of the used name where the request has none."""
        if self.options.input_type is not None or defaults.input_type is None:
            return self.options
        return replace(self.options, input_type=defaults.input_type)


def parse_fields(fields: Mapping[str, Any], limits: LimitSettings) -> EmbeddingCall:
    """Check the fields of `POST /v1/embeddings`.

    Pydantic is not used, because it takes longer, and its messages differ from OpenAI's.
    """
    for name in _FIXED_FIELDS.keys() & fields.keys():
        value = fields[name]
        if value is not None and value not in _FIXED_FIELDS[name]:
            raise unsupported_value(name, value, ", ".join(map(_as_json, _FIXED_FIELDS[name])))
    output_type, encoding, outputs = _output_types(fields)
    return EmbeddingCall(
        model=optional(fields, str, "model"),
        inputs=parse_inputs(fields, limits),
        encoding=encoding or _encoding(fields),
        output_type=output_type,
        options=EmbedOptions(
            dimensions=_dimensions(fields),
            normalize=optional(fields, bool, "normalize", "normalized"),
            input_type=optional(fields, str, "input_type", "task", "prompt_name", "text_type"),
            instruction=optional(fields, str, "instruction", "instruct"),
            truncate=_truncate(fields),
            truncate_prompt_tokens=optional(fields, int, "truncate_prompt_tokens"),
            outputs=outputs,
            top_k=count(fields, "top_k"),
        ),
    )


def render_response(
    embeddings: Embeddings, encoding: Literal["float", "base64"], model: str, output_type: OutputType = "float"
) -> bytes:
    """Return the response body as JSON. `base64` encodes the bytes of the values, which are little-endian.

    Raises:
        RequestError: The model cannot return this type of values.
    """
    (body,) = render_responses(embeddings, [len(embeddings.input_tokens)], encoding, model, output_type)
    return body


def render_responses(
    embeddings: Embeddings,
    counts: Iterable[int],
    encoding: Literal["float", "base64"],
    model: str,
    output_type: OutputType = "float",
) -> Iterator[bytes]:
    """Yield the bodies of responses, as `render_response`: the first one has the first of `counts` inputs, and so on."""
    vectors = np.ascontiguousarray(embeddings.as_type(output_type))
    vectors = vectors.astype(vectors.dtype.newbyteorder("<"), copy=False)
    stop = 0
    for size in counts:
        start, stop = stop, stop + size
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": vector if encoding == "float" else b2a_base64(vector, newline=False).decode("ascii"),
            }
            for index, vector in enumerate(vectors[start:stop])
        ]
        for item, sparse in zip(data, (embeddings.sparse or ())[start:stop], strict=False):
            item["sparse"] = {"indices": sparse.indices, "values": sparse.values}
        for item, of_tokens in zip(data, (embeddings.multi_vector or ())[start:stop], strict=False):
            of_tokens = np.ascontiguousarray(of_tokens, dtype="<f4")
            item["multi_vector"] = (
                of_tokens if encoding == "float" else b2a_base64(of_tokens.data, newline=False).decode("ascii")
            )
            if encoding == "base64":
                item["shape"] = of_tokens.shape
        tokens = sum(embeddings.input_tokens[start:stop])
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        body = {"object": "list", "data": data, "model": model, "usage": usage}
        yield orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)


def parse_inputs(fields: Mapping[str, Any], limits: LimitSettings) -> Sequence[str] | Sequence[Sequence[int]]:
    """Return the inputs of `POST /v1/embeddings`: at least one text or row of token ids, all of the same kind.

    Raises:
        RequestError: They are missing or invalid.
    """
    value = require(fields, "input")
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        supported = "a string, an array of strings, an array of token ids, an array of arrays of token ids"
        raise unsupported_value("input", value, supported, code="invalid_type")
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
    return parse_inputs({"input": [item["text"] for item in value]}, limits)  # type: ignore[return-value]  # texts stay texts


def _invalid_input(reason: str) -> RequestError:
    return RequestError(f"'$.input' is invalid: {reason}.", param="input", code="invalid_input")


def _encoding(fields: Mapping[str, Any]) -> Literal["float", "base64"]:
    text = optional(fields, str, "encoding_format")
    match folded(text) if text is not None else "float":
        case "float" | "base64" as encoding:
            return encoding
    raise unsupported_value("encoding_format", text, "'float', 'base64'")


def _output_types(fields: Mapping[str, Any]) -> tuple[OutputType, Literal["base64"] | None, tuple[OutputName, ...]]:
    """Return the type of the values, `base64` if it is requested in the place of a type, as in Jina's API, and the outputs."""
    outputs: set[OutputName] = set()
    output_type: OutputType | None = None
    encoding: Literal["base64"] | None = None
    for name in _OUTPUT_TYPE_FIELDS:
        value = fields.get(name)
        if value is None:
            continue
        for item in value if isinstance(value, list) and value else (value,):
            text = folded(item) if isinstance(item, str) else item
            if text == "base64":
                encoding = "base64"
                continue
            if isinstance(text, str) and text in _OTHER_OUTPUTS:
                outputs.add(_OTHER_OUTPUTS[text])
                continue
            kind = _OUTPUT_TYPE_SYNONYMS.get(text, text) if isinstance(text, str) else None
            if kind not in OUTPUT_TYPES:
                code = "invalid_value" if isinstance(item, str) else "invalid_type"
                supported = ", ".join(map(repr, ("dense", *_OTHER_OUTPUTS, *OUTPUT_TYPES, "base64")))
                raise unsupported_value(name, value, supported, code=code)
            outputs.add("dense")
            if output_type not in (None, kind):
                raise RequestError(f"'{name}' requests a second type of values. Request one type.", param=name)
            output_type = kind
    return output_type or "float", encoding, _with_flags(outputs or {"dense"}, fields)


def _with_flags(outputs: set[OutputName], fields: Mapping[str, Any]) -> tuple[OutputName, ...]:
    """Return the outputs, with those that FlagEmbedding's fields request, and without those that they exclude."""
    for name, output in _OUTPUT_FLAGS.items():
        is_requested = optional(fields, bool, name)
        if is_requested is not None:
            (outputs.add if is_requested else outputs.discard)(output)
    if not outputs:
        raise RequestError("The request excludes all outputs. Request one.", param="return_dense")
    return tuple(name for name in ("dense", *_OTHER_OUTPUTS.values()) if name in outputs)


def _dimensions(fields: Mapping[str, Any]) -> int | None:
    return count(fields, "dimensions", "output_dimension", "output_dimensionality", "truncate_dim")


def _truncate(fields: Mapping[str, Any]) -> Truncate | Literal["AUTO"] | None:
    name, value = first(fields, "truncate", "truncation")
    side = _truncation_side(fields)
    if value is None:
        return side
    if isinstance(value, bool):
        return (side or "AUTO") if value else "NONE"
    supported = "true, false, 'NONE', 'START', 'END'"
    if not isinstance(value, str):
        raise unsupported_value(name, value, supported, code="invalid_type")
    match folded(value):
        case "none":
            return "NONE"
        case "start" | "end" as end:
            direction: Truncate = "START" if end == "start" else "END"
            if side not in (None, direction):
                raise RequestError(f"'truncation_side' contradicts '{name}' = {value!r}.", param="truncation_side")
            return direction
    raise unsupported_value(name, value, supported)


def _truncation_side(fields: Mapping[str, Any]) -> Truncate | None:
    names = "truncation_side", "truncation_direction"
    text = optional(fields, str, *names)
    if text is not None and folded(text) not in _SIDES:
        raise unsupported_value(first(fields, *names)[0], text, "'left', 'right'")
    return _SIDES[folded(text)] if text is not None else None


def _as_json(value: object) -> str:
    return repr(value) if isinstance(value, str) else orjson.dumps(value).decode()
