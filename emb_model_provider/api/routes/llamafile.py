"""The route for embeddings of llamafile and of the server of llama.cpp."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from emb_model_provider.api.dependencies import ServicesDep
from emb_model_provider.api.fields import require
from emb_model_provider.api.routes.embeddings import embed_request, vectors_response
from emb_model_provider.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

router = APIRouter(include_in_schema=False)


@router.post("/embedding")
async def embedding(request: Request, services: ServicesDep) -> Response:
    """Return `embedding` for one text, and `results` for an array of texts, as llamafile does."""
    is_single = False

    def translate(fields: Mapping[str, Any]) -> Mapping[str, Any]:
        nonlocal is_single
        content = fields["input"] if fields.get("input") is not None else require(fields, "content")
        is_single = isinstance(content, str)
        return {"input": content, "model": fields.get("model"), "normalize": _normalize(fields)}

    answer = await embed_request(request, services, translate)
    if is_single:
        return await vectors_response(answer, lambda vectors: {"embedding": vectors[0]})
    return await vectors_response(answer, lambda vectors: {"results": [{"embedding": vector} for vector in vectors]})


def _normalize(fields: Mapping[str, Any]) -> bool | None:
    """Return whether vectors are normalized: llama.cpp has a number for each norm."""
    match fields.get("embd_normalize"):
        case None:
            return None
        case -1:
            return False
        case 2:
            return True
    raise RequestError(
        "Invalid value for 'embd_normalize'. Supported values: [-1 (none), 2 (length 1)].", param="embd_normalize"
    )
