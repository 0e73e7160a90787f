"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
from binascii import b2a_base64
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Literal

import numpy as np
import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from emb_model_provider.api.disconnect import cancelled_on_disconnect
from emb_model_provider.api.parsing import parse_embedding_call
from emb_model_provider.api.schemas import EmbeddingRequest, EmbeddingResponse, error_responses

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from emb_model_provider.observability.metrics import RequestRecord
    from emb_model_provider.registry import Registry
    from emb_model_provider.serving.engine import Embeddings
    from emb_model_provider.settings import LimitSettings

_INLINE_NUMBERS = 64 * 1024
"""Writing a body with more numbers than this is left to a thread, so that others are answered meanwhile."""
_INLINE_BODY_BYTES = 256 * 1024


PATH = "/v1/embeddings"

Endpoint = Callable[[Request], Awaitable[Response]]


class DirectEmbeddings:
    """Hands POST /v1/embeddings to an application of its own, and all else to `app`.

    FastAPI's layers, routing and dependency injection, none of which it uses, cost more than all else that is done
    for a short text (see docs/performance.md). The route is declared there all the same, for its description.
    """

    def __init__(self, app: ASGIApp, embeddings: ASGIApp) -> None:
        self._app = app
        self._embeddings = embeddings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == PATH and scope["method"] == "POST":
            await self._embeddings(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def as_asgi(endpoint: Endpoint) -> ASGIApp:
    """Return the endpoint as an application, without a router around it."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = await endpoint(Request(scope, receive))
        await response(scope, receive, send)

    return app


def router(endpoint: Endpoint) -> APIRouter:
    routes = APIRouter(tags=["embeddings"])
    routes.post(
        PATH,
        summary="Turn texts into vectors",
        response_model=EmbeddingResponse,
        responses=error_responses(400, 401, 404, 408, 413, 415, 429, 500, 503, 504),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": {"$ref": f"#/components/schemas/{EmbeddingRequest.__name__}"}
                    }
                },
            }
        },
    )(endpoint)
    return routes


def embeddings_endpoint(registry: Registry, limits: LimitSettings) -> Endpoint:
    """Return what answers POST /v1/embeddings."""

    async def create_embeddings(request: Request) -> Response:
        body = await request.body()
        record: RequestRecord = request.scope["emb_provider.record"]
        async with cancelled_on_disconnect(request):
            if len(body) > _INLINE_BODY_BYTES:
                call = await asyncio.to_thread(parse_embedding_call, body, limits)
            else:
                call = parse_embedding_call(body, limits)
            model = call.model if call.model is not None else registry.default_alias
            record.model = registry.alias_of(model)
            async with registry.using(record.model) as engine:
                embeddings = await engine.embed(call.inputs, call.options)
        _note(record, embeddings)
        if embeddings.vectors.size > _INLINE_NUMBERS:
            content = await asyncio.to_thread(rendered, embeddings, call.encoding, model)
        else:
            content = rendered(embeddings, call.encoding, model)
        headers = {"x-truncated-inputs": str(embeddings.truncated)} if embeddings.truncated else None
        return Response(content, media_type="application/json", headers=headers)

    return create_embeddings


def rendered(embeddings: Embeddings, encoding: Literal["float", "base64"], model: str) -> bytes:
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


def _note(record: RequestRecord, embeddings: Embeddings) -> None:
    record.inputs = len(embeddings.vectors)
    record.tokens = embeddings.tokens
    record.tokenize_s = embeddings.tokenize_s
    record.queue_s = embeddings.timing.queue_s
    record.inference_s = embeddings.timing.inference_s
