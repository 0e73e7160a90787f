"""`/console/playground`: similarities of a few texts, and a search in a few documents, with one model or two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from fastapi import APIRouter
from starlette.responses import Response

from emb_model_provider.api.console.page import ConsoleRoute, Page, PageDep
from emb_model_provider.api.console.snippets import Calculation, snippets_of
from emb_model_provider.api.middleware import cancelled_on_disconnect
from emb_model_provider.errors import RequestError
from emb_model_provider.serving.engine import EmbedOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from emb_model_provider.api.console.snippets import Snippet
    from emb_model_provider.api.dependencies import Services
    from emb_model_provider.serving.results import Embeddings

PATH = "/console/playground"

_MAX_TEXTS = 16
"""A larger heat map is not readable."""
_MAX_DOCUMENTS = 100
_FIELDS = ("mode", "model", "other_model", "texts", "query", "documents")

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
    """Documents in the order of their similarity to a query, with one model."""

    model: str
    ranked: Sequence[tuple[int, float]]
    """Indexes of the documents with their cosines, the most similar first."""
    measured: Embeddings
    snippets: Sequence[Snippet]


@router.get(PATH)
async def playground(page: PageDep) -> Response:
    is_search = page.request.query_params.get("mode") == "search"
    return _show(page, {"mode": "search" if is_search else "similarity"})


@router.post(PATH)
async def compute(page: PageDep) -> Response:
    fields = await page.form()
    models = list(dict.fromkeys(filter(None, (fields.get("model"), fields.get("other_model")))))
    compare = _search if fields.get("mode") == "search" else _similarities
    async with cancelled_on_disconnect(page.request):
        results = [await compare(page, model, fields) for model in models]
    return _show(page, fields, results)


def _show(page: Page, fields: Mapping[str, str], results: Sequence[Any] = ()) -> Response:
    template = "_playground_results.html" if page.is_partial else "playground.html"
    registry = page.services.registry
    return page.render(
        template,
        fields={**dict.fromkeys(_FIELDS, ""), **fields},
        results=results,
        documents=_lines(fields.get("documents", "")),
        aliases=[alias for status in registry.statuses() for alias in status.spec.aliases],
        default_alias=registry.default_alias,
    )


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
    query, documents = fields.get("query", ""), _lines(fields.get("documents", ""))
    if not query:
        raise RequestError("Enter a query.", param="query")
    if not 1 <= len(documents) <= _MAX_DOCUMENTS:
        raise RequestError(
            f"Enter 1 to {_MAX_DOCUMENTS} documents, one on each line. You entered {len(documents)}.", param="documents"
        )
    of_query = await _embed(page.services, model, [query], "query")
    measured = await _embed(page.services, model, documents, "document")
    cosines = measured.vectors @ of_query.vectors[0]
    order = np.argsort(-cosines, kind="stable")
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
        ranked=[(int(index), float(cosines[index])) for index in order],
        measured=measured,
        snippets=_snippets(page, calculation),
    )


async def _embed(services: Services, model: str, texts: Sequence[str], input_type: str | None) -> Embeddings:
    """Embed texts as `POST /v1/embeddings` does. The vectors have length 1."""
    resolved = services.registry.resolve(model)
    async with services.registry.lease(resolved.alias) as engine:
        return await engine.embed(texts, EmbedOptions(normalize=True, input_type=input_type or resolved.input_type))


def _snippets(page: Page, calculation: Calculation) -> Sequence[Snippet]:
    return snippets_of(calculation, page.service_url, needs_key=bool(page.services.settings.server.accepted_keys))


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]
