"""Azure OpenAI's route for embeddings, in which the path names the model."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from emb_model_provider.api.dependencies import ServicesDep
from emb_model_provider.api.routes.embeddings import create_response, embed_request

router = APIRouter(include_in_schema=False)


@router.post("/openai/deployments/{model:path}/embeddings")
async def embeddings(request: Request, services: ServicesDep, model: str) -> Response:
    answer = await embed_request(request, services, lambda fields: {**fields, "model": model})
    return await create_response(answer)
