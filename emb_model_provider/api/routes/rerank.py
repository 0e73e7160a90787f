"""`POST /v1/rerank`: scores the documents of a query."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np
import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from emb_model_provider.api.dependencies import ServicesDep, get_record
from emb_model_provider.api.middleware import cancelled_on_disconnect
from emb_model_provider.api.routes.embeddings import optional, read_fields, require
from emb_model_provider.api.schemas.openai import error_responses
from emb_model_provider.errors import RequestError
from emb_model_provider.serving.engine import ScoreOptions

if TYPE_CHECKING:
    from collections.abc import Mapping

PATH = "/v1/rerank"

router = APIRouter(tags=["rerank"])


@router.post(
    PATH,
    summary="Score the documents of a query",
    responses=error_responses(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504),
)
async def rerank(request: Request, services: ServicesDep) -> Response:
    """Return the documents by their scores, the best first.

    Fields of the body: `query`, `documents` (strings, or objects with `text`), and optionally `model`, `top_n`,
    `return_documents`, `max_tokens_per_doc`, `raw_scores`, `instruction`.
    """
    registry, limits, record = services.registry, services.settings.limits, get_record(request)
    fields = await read_fields(request, services)
    query, documents = require(fields, "query"), _documents(fields, limits.max_inputs)
    if not isinstance(query, str):
        raise RequestError("'query' must be a string.", param="query", code="invalid_type")
    top_n = optional(fields, int, "top_n", "top_k")
    options = ScoreOptions(
        raw=optional(fields, bool, "raw_scores"),
        instruction=optional(fields, str, "instruction", "instruct"),
        max_document_tokens=optional(fields, int, "max_tokens_per_doc"),
    )
    name = optional(fields, str, "model")
    async with cancelled_on_disconnect(request):
        model = name if name is not None else registry.default_alias
        record.model = registry.resolve(model).alias
        async with registry.lease(record.model) as engine:
            result = await engine.score_pairs([(query, document) for document in documents], options)
    record.inputs, record.tokens, record.tokenize_s = len(documents), result.tokens, result.tokenize_s
    record.queue_s, record.inference_s = result.timing.queue_s, result.timing.inference_s
    order = np.argsort(-result.scores, kind="stable")[:top_n]
    with_text = optional(fields, bool, "return_documents")
    results = [
        {"index": int(index), "relevance_score": float(result.scores[index])}
        | ({"document": {"text": documents[index]}} if with_text else {})
        for index in order
    ]
    tokens = {"input_tokens": result.tokens, "output_tokens": 0}
    body = {
        "id": f"rerank-{uuid4().hex}",
        "object": "list",
        "model": model,
        "results": results,
        "usage": {"prompt_tokens": result.tokens, "total_tokens": result.tokens},
        "meta": {"tokens": tokens, "billed_units": {"search_units": 1}},
        "tokens": tokens,
    }
    return Response(orjson.dumps(body), media_type="application/json")


def _documents(fields: Mapping[str, Any], most: int) -> list[str]:
    value = require(fields, "documents")
    items = [item.get("text") if isinstance(item, dict) else item for item in value] if isinstance(value, list) else []
    texts = [item for item in items if isinstance(item, str)]
    if not texts or len(texts) < len(items):
        raise RequestError(
            "'documents' must be an array of strings, or of objects with 'text', with at least one document.",
            param="documents",
            code="invalid_type",
        )
    if len(texts) > most:
        raise RequestError(
            f"'documents' is invalid: array length must be {most} or less", param="documents", code="array_too_long"
        )
    return texts
