"""`/v1/rerank` and `/v1/score`: the scores of documents for a query, in the form of Jina, Cohere and Voyage, or of TEI."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

import numpy as np
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from emb_model_provider.api.dependencies import Services, ServicesDep, fill_record, get_record, use_model
from emb_model_provider.api.fields import (
    MAX_INLINE_BODY_BYTES,
    count,
    first,
    flag,
    folded,
    optional,
    read_fields,
    read_texts,
    require,
    unsupported_value,
)
from emb_model_provider.api.middleware import cancelled_on_disconnect
from emb_model_provider.api.routes.embeddings import json_response
from emb_model_provider.api.schemas.openai import error_responses, request_body
from emb_model_provider.api.schemas.scores import RerankRequest, RerankResponse, ScoreRequest, ScoreResponse, TeiResult
from emb_model_provider.errors import RequestError
from emb_model_provider.serving.engine import ScoreOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from emb_model_provider.model_spec import LongDocuments
    from emb_model_provider.serving.results import Measured, PairScores
    from emb_model_provider.settings import LimitSettings

router = APIRouter(tags=["rerank"])

_ERRORS = error_responses(400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)


@router.post(
    "/v1/rerank",
    summary="Score the documents of a query",
    response_model=RerankResponse | list[TeiResult],
    responses=_ERRORS,
    openapi_extra=request_body(RerankRequest),
)
@router.post("/v2/rerank", include_in_schema=False)
@router.post("/rerank", include_in_schema=False)
async def rerank(request: Request, services: ServicesDep) -> Response:
    """Return the documents by their scores, the best first. With `texts` in the place of `documents`, as TEI does."""
    ranking = await rank(request, services)
    return await ranking.response(ranking.tei_results if ranking.call.is_tei else ranking.body)


@router.post(
    "/v1/score",
    summary="Score pairs of texts",
    response_model=ScoreResponse,
    responses=_ERRORS,
    openapi_extra=request_body(ScoreRequest),
)
async def score(request: Request, services: ServicesDep) -> Response:
    """Return the score of each pair, in the order of the request. One `text_1` is paired with each `text_2`."""
    fields = await read_fields(request, services)
    pairs, names = _pairs(fields, services.settings.limits)
    options = ScoreOptions(
        raw=raw_scores(fields),
        instruction=optional(fields, str, "instruction", "instruct"),
        long_documents=long_documents(fields),
        names=names,
    )
    model, result = await _score(request, services, optional(fields, str, "model"), pairs, options)
    body = {
        "id": f"score-{uuid4().hex}",
        "object": "list",
        "created": int(time.time()),
        "model": model,
        "data": [{"index": index, "object": "score", "score": value} for index, value in enumerate(result.scores)],
        "usage": usage(result),
    }
    return await json_response(lambda: body, result)


@dataclass(frozen=True, slots=True)
class RerankCall:
    """A valid request for the scores of documents."""

    model: str | None
    """The requested name; None: the default model."""
    query: str
    documents: Sequence[str]
    is_tei: bool
    """Whether the documents are in `texts`, as in TEI's API."""
    top_n: int | None
    """Number of documents to return; None: all."""
    with_documents: bool
    options: ScoreOptions


@dataclass(frozen=True, slots=True)
class Ranking:
    """The scored documents of a request."""

    call: RerankCall
    model: str
    """The requested name, or the alias of the default model."""
    scores: PairScores
    order: Sequence[int]
    """Places of the documents to return, the best first."""

    def results(self) -> list[dict[str, Any]]:
        """Return the results in the form of Jina and Cohere."""
        documents = self.call.documents
        return [
            {"index": index, "relevance_score": self.scores.scores[index]}
            | ({"document": {"text": documents[index]}} if self.call.with_documents else {})
            for index in self.order
        ]

    def body(self, identifier: str | None = None) -> Mapping[str, Any]:
        """Return a response body that has what the clients of Jina, Cohere, Voyage and others read.

        `identifier` is its id; None: a random one.
        """
        results = self.results()
        tokens = {"input_tokens": self.scores.tokens, "output_tokens": 0}
        return {
            "id": identifier or f"rerank-{uuid4().hex}",
            "object": "list",
            "model": self.model,
            "results": results,
            # Clients of Voyage read these.
            "data": [each | ({"document": each["document"]["text"]} if "document" in each else {}) for each in results],
            "usage": usage(self.scores),
            "meta": {"tokens": tokens, "billed_units": {"search_units": 1}},
            "tokens": tokens,
        }

    def tei_results(self) -> list[dict[str, Any]]:
        """Return the results in the form of TEI."""
        documents, scores = self.call.documents, self.scores.scores
        return [
            {"index": index, "score": scores[index]} | ({"text": documents[index]} if self.call.with_documents else {})
            for index in self.order
        ]

    async def response(self, create_body: Callable[[], Any]) -> Response:
        """Return a response with this body."""
        characters = sum(map(len, self.call.documents)) if self.call.with_documents else 0
        return await json_response(create_body, self.scores, is_large=characters > MAX_INLINE_BODY_BYTES)


async def rank(
    request: Request,
    services: Services,
    translate: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda fields: fields,
    fields: Mapping[str, Any] | None = None,
) -> Ranking:
    """Parse a request for the scores of documents, and score them.

    Args:
        request: The request.
        services: The parts of the service.
        translate: Returns the fields of `POST /v1/rerank` that mean the same as those of the request.
        fields: The fields of the body. None: it has not been read.
    """
    sent = await read_fields(request, services) if fields is None else fields
    call = parse_rerank(translate(sent), services.settings.limits)
    pairs = [(call.query, document) for document in call.documents]
    model, result = await _score(request, services, call.model, pairs, call.options)
    order: list[int] = np.argsort(-result.scores, kind="stable")[: call.top_n].tolist()
    return Ranking(call, model, result, order)


async def _score(
    request: Request, services: Services, name: str | None, pairs: Sequence[tuple[str, str]], options: ScoreOptions
) -> tuple[str, PairScores]:
    """Return the scores of pairs, and the name of the model."""
    async with cancelled_on_disconnect(request), use_model(request, services, name) as model:
        result = await model.engine.score_pairs(pairs, options.with_defaults(model.defaults))
    fill_record(get_record(request), len(pairs), result)
    return model.name, result


def usage(measured: Measured) -> Mapping[str, int]:
    return {"prompt_tokens": measured.tokens, "total_tokens": measured.tokens}


def raw_scores(fields: Mapping[str, Any]) -> bool | None:
    """Return whether scores are logits; vLLM has a field with the opposite meaning. None: the request does not say."""
    raw = flag(fields, "raw_scores")
    activated = flag(fields, "use_activation")
    return not activated if raw is None and activated is not None else raw


def parse_rerank(fields: Mapping[str, Any], limits: LimitSettings) -> RerankCall:
    """Check the fields of `POST /v1/rerank`."""
    query = require(fields, "query")
    if not isinstance(query, str):
        raise unsupported_value("query", query, "a string", code="invalid_type")
    name, _ = first(fields, "documents", "texts")
    rank_fields = fields.get("rank_fields")
    if rank_fields not in (None, ["text"]):
        raise unsupported_value("rank_fields", rank_fields, "['text']")
    return RerankCall(
        model=optional(fields, str, "model"),
        query=query,
        documents=read_texts(fields, name, limits),
        is_tei=name == "texts",
        top_n=count(fields, "top_n", "top_k"),
        with_documents=flag(fields, "return_documents", "return_text") or False,
        options=ScoreOptions(
            raw=raw_scores(fields),
            instruction=optional(fields, str, "instruction", "instruct"),
            long_documents=long_documents(fields),
            max_document_tokens=count(fields, "max_tokens_per_doc"),
            names=("query", name),
        ),
    )


def _pairs(fields: Mapping[str, Any], limits: LimitSettings) -> tuple[list[tuple[str, str]], tuple[str, str]]:
    """Return the pairs of `POST /v1/score`, and the names of the fields that have the first and the second texts."""
    name_1, _ = first(fields, "text_1", "queries")
    name_2, _ = first(fields, "text_2", "documents")
    one, two = read_texts(fields, name_1, limits), read_texts(fields, name_2, limits)
    if len(one) not in (1, len(two)):
        raise RequestError(
            f"'{name_1}' must be one text, or as many as '{name_2}', which has {len(two)}; it has {len(one)}.",
            param=name_1,
            code="invalid_input",
        )
    return list(zip(one * len(two) if len(one) == 1 else one, two, strict=True)), (name_1, name_2)


def long_documents(fields: Mapping[str, Any]) -> LongDocuments | Literal["reject"] | None:
    """Return what happens to documents that do not fit. None: as the model or its alias says."""
    side = optional(fields, str, "truncation_direction", "truncation_side")
    if side is not None and folded(side) != "right":
        raise unsupported_value(first(fields, "truncation_direction", "truncation_side")[0], side, "'right'")
    name, value = first(fields, "truncate", "truncation")
    match folded(value) if isinstance(value, str) else value:
        case None | True | "true":
            return None
        case False | "false" | "none":
            return "reject"
        case "end":
            return "cut"
    code = "invalid_value" if isinstance(value, str) else "invalid_type"
    raise unsupported_value(name, value, "true, false, 'NONE', 'END'", code=code)
