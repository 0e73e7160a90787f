"""`/console/playground`: similarities of a few texts, and a search in a few documents, with one model or two, or a reranker."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import APIRouter
from starlette.responses import Response

from emb_model_provider.api.console.page import ConsoleRoute, Page, PageDep
from emb_model_provider.api.console.snippets import Calculation, rerank_snippets, snippets_of
from emb_model_provider.api.middleware import cancelled_on_disconnect
from emb_model_provider.errors import RequestError
from emb_model_provider.serving.engine import EmbedOptions, ScoreOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from emb_model_provider.api.console.snippets import Snippet
    from emb_model_provider.api.dependencies import Services
    from emb_model_provider.backends.base import Task
    from emb_model_provider.registry import ModelStatus
    from emb_model_provider.serving.results import Embeddings, PairScores

PATH = "/console/playground"

_MAX_TEXTS = 16
"""A larger heat map is not readable."""
_MAX_DOCUMENTS = 100
_FIELDS = ("mode", "model", "other_model", "reranker", "texts", "query", "documents")

router = APIRouter(route_class=ConsoleRoute, include_in_schema=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Similarities:
    """The similarities of texts, with one model."""

    model: str
    texts: Sequence[str]
    cosines: Sequence[Sequence[float]]
    nearest: Sequence[int]
    """For each text, the index of the most similar other one."""
    measured: Embeddings
    snippets: Sequence[Snippet]


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchResult:
    """Documents in the order of their similarity to a query, or of their scores, with one model."""

    model: str
    is_reranked: bool
    """Whether the documents have scores of a reranker, not cosines."""
    ranked: Sequence[tuple[int, float]]
    """Indexes of the documents with their cosines or scores, the best first."""
    measured: Embeddings | PairScores
    snippets: Sequence[Snippet]


@router.get(PATH)
async def playground(page: PageDep) -> Response:
    is_search = page.request.query_params.get("mode") == "search"
    return _show(page, {"mode": "search" if is_search else "similarity"})


@router.post(PATH)
async def compute(page: PageDep) -> Response:
    fields = await page.form()
    models = list(dict.fromkeys(filter(None, (fields.get("model"), fields.get("other_model")))))
    is_search = fields.get("mode") == "search"
    compare = _search if is_search else _similarities
    results: list[Any] = []
    async with cancelled_on_disconnect(page.request):
        results += [await compare(page, model, fields) for model in models]
        if is_search and (reranker := fields.get("reranker")):
            results.append(await _rerank(page, reranker, fields))
    return _show(page, fields, results)


def _show(page: Page, fields: Mapping[str, str], results: Sequence[Any] = ()) -> Response:
    template = "_playground_results.html" if page.is_partial else "playground.html"
    registry = page.services.registry
    statuses = registry.statuses()
    return page.render(
        template,
        fields={**dict.fromkeys(_FIELDS, ""), **fields},
        results=results,
        documents=_lines(fields.get("documents", "")),
        aliases=_aliases(statuses, "embed"),
        rerankers=_aliases(statuses, "rerank"),
        default_alias=registry.default_alias,
    )


def _aliases(statuses: Sequence[ModelStatus], task: Task) -> list[str]:
    """Return the aliases of the models that have a task, or may have it: that is known once they are loaded."""
    able = [status for status in statuses if status.tasks is None or task in status.tasks]
    return [alias for status in able for alias in status.spec.aliases]


async def _similarities(page: Page, model: str, fields: Mapping[str, str]) -> Similarities:
    texts = _lines(fields.get("texts", ""))
    if not 2 <= len(texts) <= _MAX_TEXTS:
        raise RequestError(f"Enter 2 to {_MAX_TEXTS} texts, one on each line. You entered {len(texts)}.", param="texts")
    measured = await _embed(page.services, model, texts, None)
    cosines = measured.vectors @ measured.vectors.T
    others = cosines - 2 * np.eye(len(texts), dtype=np.float32)
    calculation = Calculation(
        requests={"texts": {"model": model, "input": texts, "normalize": True}},
        python="texts @ texts.T",
        javascript="texts.map((a) => texts.map((b) => dot(a, b)))",
    )
    return Similarities(
        model=model,
        texts=texts,
        cosines=cosines.tolist(),
        nearest=others.argmax(axis=1).tolist(),
        measured=measured,
        snippets=_snippets(page, calculation),
    )


async def _search(page: Page, model: str, fields: Mapping[str, str]) -> SearchResult:
    query, documents = _query_and_documents(fields)
    of_query = await _embed(page.services, model, [query], "query")
    measured = await _embed(page.services, model, documents, "document")
    cosines = measured.vectors @ of_query.vectors[0]
    calculation = Calculation(
        requests={
            "query": {"model": model, "input": [query], "input_type": "query", "normalize": True},
            "documents": {"model": model, "input": documents, "input_type": "document", "normalize": True},
        },
        python="documents @ query[0]",
        javascript="documents.map((each) => dot(each, query[0]))",
    )
    return SearchResult(
        model=model,
        is_reranked=False,
        ranked=_ranked(cosines),
        measured=measured,
        snippets=_snippets(page, calculation),
    )


async def _rerank(page: Page, model: str, fields: Mapping[str, str]) -> SearchResult:
    """Score the documents as `POST /v1/rerank` does."""
    query, documents = _query_and_documents(fields)
    services = page.services
    resolved = services.registry.resolve(model)
    options = ScoreOptions().with_defaults(resolved.defaults)
    async with services.registry.lease(resolved.alias) as engine:
        measured = await engine.score_pairs([(query, document) for document in documents], options)
    body = {"model": model, "query": query, "documents": documents}
    return SearchResult(
        model=model,
        is_reranked=True,
        ranked=_ranked(measured.scores),
        measured=measured,
        snippets=rerank_snippets(body, page.service_url, needs_key=bool(services.settings.server.accepted_keys)),
    )


def _query_and_documents(fields: Mapping[str, str]) -> tuple[str, list[str]]:
    query, documents = fields.get("query", ""), _lines(fields.get("documents", ""))
    if not query:
        raise RequestError("Enter a query.", param="query")
    if not 1 <= len(documents) <= _MAX_DOCUMENTS:
        raise RequestError(
            f"Enter 1 to {_MAX_DOCUMENTS} documents, one on each line. You entered {len(documents)}.", param="documents"
        )
    return query, documents


def _ranked(scores: NDArray[np.float32]) -> list[tuple[int, float]]:
    return [(int(index), float(scores[index])) for index in np.argsort(-scores, kind="stable")]


async def _embed(services: Services, model: str, texts: Sequence[str], input_type: str | None) -> Embeddings:
    """Embed texts as `POST /v1/embeddings` does. The vectors have length 1."""
    resolved = services.registry.resolve(model)
    async with services.registry.lease(resolved.alias) as engine:
        return await engine.embed(
            texts, EmbedOptions(normalize=True, input_type=input_type or resolved.defaults.input_type)
        )


def _snippets(page: Page, calculation: Calculation) -> Sequence[Snippet]:
    return snippets_of(calculation, page.service_url, needs_key=bool(page.services.settings.server.accepted_keys))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
