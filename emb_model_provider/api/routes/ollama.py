"""Ollama's routes for embeddings and for the description of models."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from emb_model_provider.api.dependencies import ServicesDep
from emb_model_provider.api.fields import optional, read_fields, require
from emb_model_provider.api.routes.embeddings import embed_request, vectors_response
from emb_model_provider.registry import State

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emb_model_provider.registry import ModelStatus
    from emb_model_provider.serving.results import Embeddings

OLLAMA_VERSION = "0.13.0"
"""The version of Ollama whose API these routes implement. Clients compare it with the version that they need."""

router = APIRouter(include_in_schema=False)


@router.post("/api/embed")
async def embed(request: Request, services: ServicesDep) -> Response:
    """Return normalized vectors of one text or of several."""
    answer = await embed_request(
        request,
        services,
        lambda fields: {
            "model": require(fields, "model"),
            "input": require(fields, "input"),
            "truncate": fields.get("truncate"),
            "dimensions": fields.get("dimensions"),
            "normalize": True,
        },
    )
    return await vectors_response(
        answer,
        lambda vectors: {
            "model": answer.model,
            "embeddings": vectors,
            "total_duration": _nanoseconds(answer.embeddings),
            "load_duration": 0,
            "prompt_eval_count": answer.embeddings.tokens,
        },
    )


@router.post("/api/embeddings")
async def embeddings(request: Request, services: ServicesDep) -> Response:
    """Return the vector of one text; the older of the two routes."""
    answer = await embed_request(
        request, services, lambda fields: {"model": require(fields, "model"), "input": _prompt(fields)}
    )
    return await vectors_response(answer, lambda vectors: {"embedding": vectors[0]})


@router.get("/api/tags")
async def tags(services: ServicesDep) -> Response:
    statuses = await services.models.statuses()
    return JSONResponse({"models": [_model(status, alias) for status in statuses for alias in status.spec.aliases]})


@router.get("/api/ps")
async def loaded(services: ServicesDep) -> Response:
    statuses = [status for status in services.registry.statuses() if status.state is State.READY]
    return JSONResponse({"models": [{**_model(status, status.spec.alias), "size_vram": 0} for status in statuses]})


@router.post("/api/show")
async def show(request: Request, services: ServicesDep) -> Response:
    fields = await read_fields(request, services)
    name = optional(fields, str, "model", "name") or require(fields, "name")
    status, _ = await services.models.status(name)
    description = status.description
    info: dict[str, Any] = {"general.architecture": "embedding", "general.basename": status.spec.name}
    if description is not None:
        info |= {
            "embedding.context_length": description.max_length,
            "embedding.embedding_length": description.dimension,
        }
    return JSONResponse(
        {
            "modelfile": "",
            "parameters": "",
            "template": "{{ .Prompt }}",
            "details": _details(status),
            "model_info": info,
            "capabilities": ["embedding"] if description is None or "embed" in description.tasks else [],
            "modified_at": _modified_at(status),
        }
    )


@router.get("/api/version")
async def version() -> Response:
    return JSONResponse({"version": OLLAMA_VERSION})


def _prompt(fields: Mapping[str, Any]) -> list[Any]:
    return [require(fields, "prompt")]


def _model(status: ModelStatus, alias: str) -> dict[str, Any]:
    snapshot = status.snapshot
    return {
        "name": alias,
        "model": alias,
        "modified_at": _modified_at(status),
        "size": status.memory_bytes or (snapshot.size if snapshot is not None else 0),
        "digest": (snapshot.revision if snapshot is not None else None) or "",
        "details": _details(status),
    }


def _details(status: ModelStatus) -> dict[str, Any]:
    description = status.description
    return {
        "parent_model": "",
        "format": description.backend if description is not None else "",
        "family": "embedding",
        "families": ["embedding"],
        "parameter_size": "",
        "quantization_level": description.precision if description is not None else "",
    }


def _modified_at(status: ModelStatus) -> str:
    return datetime.fromtimestamp(status.created, UTC).isoformat()


def _nanoseconds(embeddings: Embeddings) -> int:
    timing = embeddings.timing
    return int(1e9 * (embeddings.tokenize_s + timing.queue_s + timing.inference_s))
