"""Routes of Hugging Face's text-embeddings-inference (TEI). They use the default model, unless `model` names another."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from emb_model_provider.api.dependencies import Services, ServicesDep, fill_record, get_record, use_model
from emb_model_provider.api.fields import read_fields, require
from emb_model_provider.api.middleware import cancelled_on_disconnect
from emb_model_provider.api.routes.classify import score_labels
from emb_model_provider.api.routes.embeddings import (
    embed_request,
    embeddings_response,
    json_response,
    parse_fields,
    vectors_response,
)
from emb_model_provider.api.schemas.openai import error_responses, request_body
from emb_model_provider.api.schemas.scores import SimilarityRequest
from emb_model_provider.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from emb_model_provider.backends.base import ModelDescription, SparseVector

router = APIRouter(tags=["embeddings"])


@router.post("/embed", include_in_schema=False)
async def embed(request: Request, services: ServicesDep) -> Response:
    """Return an array with a vector for each input, also for one text."""
    answer = await embed_request(request, services, _translate)
    return await vectors_response(answer, lambda vectors: vectors)


@router.post("/embed_sparse", include_in_schema=False)
async def embed_sparse(request: Request, services: ServicesDep) -> Response:
    """Return an array with a sparse vector for each input, also for one text."""
    answer = await embed_request(request, services, lambda fields: _translate(fields, "sparse"))
    vectors = answer.embeddings.sparse or ()
    return await embeddings_response(answer, lambda: [_weights(vector) for vector in vectors])


@router.post("/embed_all", include_in_schema=False)
async def embed_all(request: Request, services: ServicesDep) -> Response:
    """Return an array with the vectors of the tokens of each input, also for one text."""
    answer = await embed_request(request, services, lambda fields: _translate(fields, "multi_vector"))
    vectors = answer.embeddings.multi_vector or ()
    return await embeddings_response(answer, lambda: list(map(np.ascontiguousarray, vectors)))


@router.post("/", include_in_schema=False)
async def embed_or_compare(request: Request, services: ServicesDep) -> Response:
    """Do what `/embed` or `/similarity` does: the inputs show which."""
    fields = await read_fields(request, services)
    if isinstance(fields.get("inputs"), dict):
        return await _compare(request, services, fields)
    answer = await embed_request(request, services, _translate, fields)
    return await vectors_response(answer, lambda vectors: vectors)


@router.post("/similarity", include_in_schema=False)
@router.post(
    "/v1/similarity",
    summary="Compare a text with others",
    response_model=list[float],
    responses=error_responses(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504),
    openapi_extra=request_body(SimilarityRequest),
)
async def similarity(request: Request, services: ServicesDep) -> Response:
    """Return how similar each sentence is to the source.

    It is the cosine of dense vectors. Of other models, it is the dot product of sparse vectors, or MaxSim of the vectors of
    tokens, of the source as a query and the sentences as documents.
    """
    return await _compare(request, services, await read_fields(request, services))


@router.post("/predict", include_in_schema=False)
async def predict(request: Request, services: ServicesDep) -> Response:
    """Return the scores of a text or a pair of texts by label, the best first; an array of them for a batch."""
    fields = await read_fields(request, services)
    inputs, is_single = _predicted(fields, services.settings.limits.max_inputs)
    _, result = await score_labels(request, services, fields, inputs)
    predictions = [
        [{"score": row[index], "label": result.labels[index]} for index in np.argsort(-row, kind="stable")]
        for row in result.scores
    ]
    return await json_response(lambda: predictions[0] if is_single else predictions, result)


@router.get("/info", include_in_schema=False)
async def info(services: ServicesDep) -> Response:
    """Describe the default model."""
    registry, settings = services.registry, services.settings
    status = registry.status(registry.default_alias)
    description, snapshot = status.description, status.snapshot
    return JSONResponse(
        {
            "model_id": status.spec.name,
            "model_sha": snapshot.revision if snapshot is not None else status.spec.revision,
            "model_dtype": description.precision if description is not None else None,
            "model_type": _model_type(description),
            "max_input_length": description.max_length if description is not None else None,
            "max_batch_tokens": settings.batching.max_batch_tokens,
            "max_client_batch_size": settings.limits.max_inputs,
            "auto_truncate": status.spec.truncate != "NONE",
            "version": version("emb-model-provider"),
        }
    )


async def _compare(request: Request, services: Services, fields: Mapping[str, Any]) -> Response:
    call = parse_fields(_translate_pairs(fields), services.settings.limits)
    source, *others = cast("Sequence[str]", call.inputs)
    async with cancelled_on_disconnect(request), use_model(request, services, call.model) as model:
        result = await model.engine.similarity(source, others, call.options_for(model.defaults))
    fill_record(get_record(request), len(call.inputs), result)
    return await json_response(lambda: result.values, result)


def _model_type(description: ModelDescription | None) -> Mapping[str, Any]:
    if description is None or "scores" not in description.outputs:
        return {"embedding": {"pooling": description.pooling if description is not None else None}}
    labels = {
        "id2label": {str(index): label for index, label in enumerate(description.labels)},
        "label2id": {label: index for index, label in enumerate(description.labels)},
    }
    return {"reranker" if description.kind == "reranker" else "classifier": labels}


def _weights(vector: SparseVector) -> list[dict[str, Any]]:
    return [
        {"index": index, "value": value} for index, value in zip(vector.indices.tolist(), vector.values, strict=True)
    ]


def _predicted(fields: Mapping[str, Any], most: int) -> tuple[list[str | tuple[str, str]], bool]:
    """Return the texts and pairs of texts to classify, and whether the request has only one of them."""
    match require(fields, "inputs"):
        case str(text):
            return [text], True
        case [str(one), str(other)]:
            return [(one, other)], True
        case [*items] if items and all(map(_is_text_or_pair, items)):
            if len(items) > most:
                raise RequestError(
                    f"'inputs' is invalid: array length must be {most} or less", param="inputs", code="array_too_long"
                )
            return [item[0] if len(item) == 1 else (item[0], item[1]) for item in items], False
    raise RequestError(
        "'inputs' must be a string, a pair of strings, or an array of arrays with one or two strings, such as "
        '[["a text"], ["a text", "its pair"]].',
        param="inputs",
        code="invalid_type",
    )


def _is_text_or_pair(item: Any) -> bool:
    return isinstance(item, list) and len(item) in (1, 2) and all(isinstance(text, str) for text in item)


def _translate_pairs(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    match require(fields, "inputs"):
        case {"source_sentence": str(source), "sentences": [*sentences]} if sentences:
            parameters = fields.get("parameters") or {}
            if not isinstance(parameters, dict):
                raise RequestError("'parameters' must be an object.", param="parameters", code="invalid_type")
            return _translate({**parameters, "model": fields.get("model"), "inputs": [source, *sentences]})
    raise RequestError(
        "'inputs' must have 'source_sentence', a string, and 'sentences', an array of strings.",
        param="inputs",
        code="invalid_type",
    )


def _translate(fields: Mapping[str, Any], output: str = "dense") -> Mapping[str, Any]:
    normalize = fields.get("normalize")
    return {
        "model": fields.get("model"),
        "input": require(fields, "inputs"),
        "normalize": True if normalize is None else normalize,
        "truncate": _truncate(fields),
        "prompt_name": fields.get("prompt_name"),
        "dimensions": fields.get("dimensions"),
        "embedding_types": [output],
        "top_k": fields.get("top_k"),
    }


def _truncate(fields: Mapping[str, Any]) -> Any:
    """Return the side from which inputs are truncated: TEI has a boolean, and a field for the side."""
    truncate, side = fields.get("truncate"), fields.get("truncation_direction")
    if truncate is False or side is None:
        return truncate
    match side:
        case "Left" | "left" | "LEFT":
            return "START"
        case "Right" | "right" | "RIGHT":
            return "END"
    raise RequestError(
        "Invalid value for 'truncation_direction'. Supported values: ['Left', 'Right'].", param="truncation_direction"
    )
