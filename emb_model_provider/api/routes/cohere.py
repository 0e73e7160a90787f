"""Cohere's routes for embeddings, versions 1 and 2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from emb_model_provider.api.dependencies import ServicesDep, get_record
from emb_model_provider.api.routes.embeddings import embed_request, require, vectors_response
from emb_model_provider.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from emb_model_provider.api.routes.embeddings import EmbeddingAnswer

router = APIRouter(include_in_schema=False)


@router.post("/v1/embed")
async def embed_v1(request: Request, services: ServicesDep) -> Response:
    """Return the vectors as an array, or by type if the request names types."""
    answer = await embed_request(request, services, _translate)
    by_type = answer.fields.get("embedding_types") is not None
    response_type = "embeddings_by_type" if by_type else "embeddings_floats"

    def body(vectors: NDArray[Any]) -> Mapping[str, Any]:
        embeddings = {"float": vectors} if by_type else vectors
        return {"response_type": response_type, "embeddings": embeddings, **_common_fields(request, answer, "1")}

    return await vectors_response(answer, body)


@router.post("/v2/embed")
async def embed_v2(request: Request, services: ServicesDep) -> Response:
    answer = await embed_request(request, services, _translate)
    return await vectors_response(
        answer, lambda vectors: {"embeddings": {"float": vectors}, **_common_fields(request, answer, "2")}
    )


def _translate(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    if fields.get("images"):
        raise RequestError("Images are not supported: send 'texts'.", param="images")
    types = fields.get("embedding_types")
    if types is not None and types != ["float"]:
        raise RequestError(
            "Invalid value for 'embedding_types'. Supported values: [['float']].", param="embedding_types"
        )
    return {
        "model": fields.get("model"),
        "input": _texts(fields["inputs"]) if fields.get("inputs") is not None else require(fields, "texts"),
        "input_type": fields.get("input_type"),
        "output_dimension": fields.get("output_dimension"),
        "truncate": fields.get("truncate"),
        "truncate_prompt_tokens": fields.get("max_tokens"),
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
