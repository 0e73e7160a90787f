"""Cohere's routes for embeddings, versions 1 and 2."""

from __future__ import annotations

from base64 import b64encode
from typing import TYPE_CHECKING, Any, Literal, get_args

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from emb_model_provider.api.dependencies import ServicesDep, get_record
from emb_model_provider.api.fields import require
from emb_model_provider.api.routes.embeddings import embed_request, vectors_response
from emb_model_provider.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from emb_model_provider.api.routes.embeddings import EmbeddingAnswer

_Type = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]
_TYPES: tuple[_Type, ...] = get_args(_Type)
"""Types of vectors. `base64` encodes little-endian float32."""

router = APIRouter(include_in_schema=False)


@router.post("/v1/embed")
async def embed_v1(request: Request, services: ServicesDep) -> Response:
    """Return the vectors as an array, or by type if the request names types."""
    answer = await embed_request(request, services, _translate)
    by_type = answer.fields.get("embedding_types") is not None
    response_type = "embeddings_by_type" if by_type else "embeddings_floats"

    def body(vectors: NDArray[np.float32]) -> Mapping[str, Any]:
        embeddings = _by_type(answer, vectors) if by_type else vectors
        return {"response_type": response_type, "embeddings": embeddings, **_common_fields(request, answer, "1")}

    return await vectors_response(answer, body)


@router.post("/v2/embed")
async def embed_v2(request: Request, services: ServicesDep) -> Response:
    answer = await embed_request(request, services, _translate)
    return await vectors_response(
        answer, lambda vectors: {"embeddings": _by_type(answer, vectors), **_common_fields(request, answer, "2")}
    )


def _translate(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    if fields.get("images"):
        raise RequestError("Images are not supported: send 'texts'.", param="images")
    _types(fields)  # an error is raised before the texts are embedded
    return {
        "model": fields.get("model"),
        "input": _texts(fields["inputs"]) if fields.get("inputs") is not None else require(fields, "texts"),
        "input_type": fields.get("input_type"),
        "output_dimension": fields.get("output_dimension"),
        "truncate": fields.get("truncate"),
        "truncate_prompt_tokens": fields.get("max_tokens"),
    }


def _types(fields: Mapping[str, Any]) -> Sequence[_Type]:
    """Return the requested types of vectors, by default `float`."""
    types = fields.get("embedding_types")
    if types is None:
        return ("float",)
    if isinstance(types, list) and types and all(kind in _TYPES for kind in types):
        return types
    raise RequestError(
        f"Invalid value for 'embedding_types'. Supported values: arrays of [{', '.join(map(repr, _TYPES))}].",
        param="embedding_types",
    )


def _by_type(answer: EmbeddingAnswer, vectors: NDArray[np.float32]) -> Mapping[str, Any]:
    return {
        kind: [b64encode(vector).decode() for vector in vectors]
        if kind == "base64"
        else answer.embeddings.as_type(kind)
        for kind in _types(answer.fields)
    }


def _texts(inputs: Any) -> list[str]:
    """Return the texts of `inputs`, each of which is one part of type `text`."""
    match inputs:
        case [*items] if items:
            texts = [_text(item) for item in items]
            if all(text is not None for text in texts):
                return [text for text in texts if text is not None]
    raise RequestError("Each item of 'inputs' must have one content of type 'text'.", param="inputs")


def _text(item: Any) -> str | None:
    match item:
        case {"content": [{"type": "text", "text": str(text)}]}:
            return text
    return None


def _common_fields(request: Request, answer: EmbeddingAnswer, version: str) -> Mapping[str, Any]:
    tokens = answer.embeddings.tokens
    return {
        "id": get_record(request).request_id,
        "texts": answer.call.inputs,
        "meta": {"api_version": {"version": version}, "billed_units": {"input_tokens": tokens}},
    }
