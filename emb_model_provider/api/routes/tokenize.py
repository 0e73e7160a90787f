"""`/tokenize` and `/v1/tokenize`: the tokens of texts, in the forms of TEI and vLLM."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from emb_model_provider.api.dependencies import Services, ServicesDep, use_model
from emb_model_provider.api.fields import optional, read_fields, require
from emb_model_provider.api.middleware import cancelled_on_disconnect
from emb_model_provider.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from emb_model_provider.backends.tokenization import Token
    from emb_model_provider.settings import LimitSettings

router = APIRouter(include_in_schema=False)


@router.post("/tokenize")
@router.post("/v1/tokenize")
async def tokenize(request: Request, services: ServicesDep) -> Response:
    """Return the tokens of `inputs` as TEI does, or the number and ids of the tokens of `prompt` as vLLM does."""
    fields = await read_fields(request, services)
    async with cancelled_on_disconnect(request):
        if fields.get("inputs") is None:
            (tokens,), max_length = await _tokenize(request, services, fields, [_text(fields, "prompt")])
            ids = [token.id for token in tokens]
            return JSONResponse({"tokens": ids, "count": len(ids), "max_model_len": max_length})
        rows, _ = await _tokenize(request, services, fields, _texts(fields, services.settings.limits))
        # On a thread, because there can be hundreds of thousands of tokens.
        content = await asyncio.to_thread(_render_tei, rows)
    return Response(content, media_type="application/json")


async def _tokenize(
    request: Request, services: Services, fields: Mapping[str, Any], texts: list[str]
) -> tuple[list[list[Token]], int]:
    """Return the tokens of each text, and the length of the longest input of the model."""
    add_special_tokens = optional(fields, bool, "add_special_tokens")
    async with use_model(request, services, optional(fields, str, "model")) as model:
        tokens = await model.engine.tokenize(
            texts,
            input_type=optional(fields, str, "prompt_name", "input_type") or model.defaults.input_type,
            add_special_tokens=add_special_tokens is not False,
        )
        return tokens, model.engine.description.max_length


def _texts(fields: Mapping[str, Any], limits: LimitSettings) -> list[str]:
    match fields["inputs"]:
        case str(text):
            return [text]
        case [*texts] if texts and len(texts) <= limits.max_inputs and all(isinstance(text, str) for text in texts):
            return texts
    raise RequestError(
        f"'inputs' must be a string, or an array of 1 to {limits.max_inputs} strings.",
        param="inputs",
        code="invalid_type",
    )


def _text(fields: Mapping[str, Any], name: str) -> str:
    text = require(fields, name)
    if not isinstance(text, str):
        raise RequestError(f"'{name}' must be a string.", param=name, code="invalid_type")
    return text


def _render_tei(rows: Sequence[Sequence[Token]]) -> bytes:
    return orjson.dumps([[_tei_token(token) for token in row] for row in rows])


def _tei_token(token: Token) -> Mapping[str, Any]:
    start, stop = (None, None) if token.is_special else (token.start, token.stop)
    return {"id": token.id, "text": token.text, "special": token.is_special, "start": start, "stop": stop}
