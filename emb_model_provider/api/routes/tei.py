"""Routes of Hugging Face's text-embeddings-inference (TEI). They use the default model, unless `model` names another."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from emb_model_provider.api.dependencies import ServicesDep
from emb_model_provider.api.routes.embeddings import embed_request, require, vectors_response
from emb_model_provider.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

router = APIRouter(include_in_schema=False)


@router.post("/embed")
async def embed(request: Request, services: ServicesDep) -> Response:
    """Return an array with a vector for each input, also for one text."""
    answer = await embed_request(request, services, _translate)
    return await vectors_response(answer, lambda vectors: vectors)


@router.post("/")
async def embed_or_compare(request: Request, services: ServicesDep) -> Response:
    """Do what `/embed` or `/similarity` does: the inputs show which."""
    answer = await embed_request(request, services, _translate_either)
    if isinstance(answer.fields.get("inputs"), dict):
        return await vectors_response(answer, _similarities)
    return await vectors_response(answer, lambda vectors: vectors)


@router.post("/similarity")
async def similarity(request: Request, services: ServicesDep) -> Response:
    """Return the cosine of one sentence and each of several others."""
    answer = await embed_request(request, services, _translate_pairs)
    return await vectors_response(answer, _similarities)


@router.get("/info")
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
            "model_type": {"embedding": {"pooling": description.pooling if description is not None else None}},
            "max_input_length": description.max_length if description is not None else None,
            "max_batch_tokens": settings.batching.max_batch_tokens,
            "max_client_batch_size": settings.limits.max_inputs,
            "auto_truncate": status.spec.truncate != "NONE",
            "version": version("emb-model-provider"),
        }
    )


def _similarities(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the cosine of the first vector and each of the others. All of them have length 1."""
    return np.ascontiguousarray(vectors[1:] @ vectors[0])


def _translate_either(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    return (_translate_pairs if isinstance(fields.get("inputs"), dict) else _translate)(fields)


def _translate_pairs(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    match require(fields, "inputs"):
        case {"source_sentence": str(source), "sentences": [*sentences]} if sentences:
            parameters = fields.get("parameters") or {}
            if not isinstance(parameters, dict):
                raise RequestError("'parameters' must be an object.", param="parameters", code="invalid_type")
            return _translate(
                {**parameters, "normalize": True, "model": fields.get("model"), "inputs": [source, *sentences]}
            )
    raise RequestError(
        "'inputs' must have 'source_sentence', a string, and 'sentences', an array of strings.",
        param="inputs",
        code="invalid_type",
    )


def _translate(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    normalize = fields.get("normalize")
    return {
        "model": fields.get("model"),
        "input": require(fields, "inputs"),
        "normalize": True if normalize is None else normalize,
        "truncate": _truncate(fields),
        "prompt_name": fields.get("prompt_name"),
        "dimensions": fields.get("dimensions"),
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
