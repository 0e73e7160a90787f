"""`POST /v1/classify`: the labels of texts, in the form of vLLM."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from uuid import uuid4

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from emb_model_provider.api.dependencies import Services, ServicesDep, fill_record, get_record, use_model
from emb_model_provider.api.fields import optional, read_fields, read_texts
from emb_model_provider.api.middleware import cancelled_on_disconnect
from emb_model_provider.api.routes.embeddings import json_response
from emb_model_provider.api.routes.rerank import long_documents, raw_scores, usage
from emb_model_provider.api.schemas.openai import error_responses, request_body
from emb_model_provider.api.schemas.scores import ClassifyRequest, ClassifyResponse
from emb_model_provider.serving.engine import ScoreOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from emb_model_provider.serving.results import Classifications

router = APIRouter(tags=["classify"])


@router.post(
    "/v1/classify",
    summary="Score the labels of texts",
    response_model=ClassifyResponse,
    responses=error_responses(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504),
    openapi_extra=request_body(ClassifyRequest),
)
async def classify(request: Request, services: ServicesDep) -> Response:
    """Return the best label of each text, and the scores of all labels in the order of the model's `labels`."""
    fields = await read_fields(request, services)
    texts = read_texts(fields, "input", services.settings.limits)
    model, result = await score_labels(request, services, fields, texts)
    body = {
        "id": f"classify-{uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [
            {
                "index": index,
                "label": result.labels[best],
                "probs": result.scores[index],
                "num_classes": len(result.labels),
            }
            for index, best in enumerate(result.scores.argmax(axis=1))
        ],
        "usage": usage(result),
    }
    return await json_response(lambda: body, result)


async def score_labels(
    request: Request, services: Services, fields: Mapping[str, Any], inputs: Sequence[str | tuple[str, str]]
) -> tuple[str, Classifications]:
    """Return the requested name of the model, and the scores of texts, or of pairs of texts, by label."""
    options = ScoreOptions(raw=raw_scores(fields), long_documents=long_documents(fields))
    name = optional(fields, str, "model")
    async with cancelled_on_disconnect(request), use_model(request, services, name) as model:
        result = await model.engine.classify(inputs, options.with_defaults(model.defaults))
    fill_record(get_record(request), len(inputs), result)
    return model.name, result
