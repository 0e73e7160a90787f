"""DashScope's own route for rerankers. Its compatible API is `/v1/reranks`, which is `/v1/rerank` here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from emb_model_provider.api.dependencies import ServicesDep, get_record
from emb_model_provider.api.fields import require, unsupported_value
from emb_model_provider.api.paths import DASHSCOPE_RERANK
from emb_model_provider.api.routes.rerank import rank

if TYPE_CHECKING:
    from collections.abc import Mapping

router = APIRouter(include_in_schema=False)


@router.post(DASHSCOPE_RERANK)
async def rerank(request: Request, services: ServicesDep) -> Response:
    ranking = await rank(request, services, _translate)
    return await ranking.response(
        lambda: {
            "output": {"results": ranking.results()},
            "usage": {"total_tokens": ranking.scores.tokens},
            "request_id": get_record(request).request_id,
        }
    )


def _translate(fields: Mapping[str, Any]) -> Mapping[str, Any]:
    content, parameters = require(fields, "input"), fields.get("parameters") or {}
    for name, value in (("input", content), ("parameters", parameters)):
        if not isinstance(value, dict):
            raise unsupported_value(name, value, "an object", code="invalid_type")
    return {**parameters, **content, "model": fields.get("model")}
