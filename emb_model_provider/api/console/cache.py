"""`/console/cache`: the models on disk, what removing them frees, and their removal."""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter
from starlette.responses import Response

from emb_model_provider.api.console.page import ConsoleRoute, Page, PageDep, parse_form
from emb_model_provider.api.routes import cached_models
from emb_model_provider.api.schemas.management import ListQuery, RemoveQuery
from emb_model_provider.errors import RequestError

PATH = "/console/cache"

router = APIRouter(route_class=ConsoleRoute, include_in_schema=False)


@router.get(PATH)
async def cache(page: PageDep) -> Response:
    return await _show(page, "cache.html")


@router.get(f"{PATH}/remove")
async def preview(page: PageDep) -> Response:
    """Show what a removal would remove."""
    fields = dict(page.request.query_params)
    query = parse_form(RemoveQuery, {**fields, "unload": "true", "dry_run": "true"})
    removed = await cached_models.remove(page.services, page.request, _model_name(fields), query)
    if page.is_partial:
        return page.notice("_removal.html", removed=removed, fields=fields)
    return page.render("removal.html", removed=removed, fields=fields)


@router.post(f"{PATH}/remove")
async def remove(page: PageDep) -> Response:
    fields = dict(await page.form())
    query = parse_form(RemoveQuery, {**fields, "unload": "true"})
    removed = await cached_models.remove(page.services, page.request, _model_name(fields), query)
    return await _show_content(page, freed=removed.freed)


@router.post(f"{PATH}/prune")
async def prune(page: PageDep) -> Response:
    removed = await page.services.in_disk_thread(page.services.manager.prune)
    return await _show_content(page, freed=removed.freed)


def _model_name(fields: dict[str, str]) -> str:
    name = fields.get("model_name")
    if not name:
        raise RequestError("Missing required parameter: 'model_name'.", param="model_name")
    return name


async def _show_content(page: Page, freed: int) -> Response:
    return await _show(page, "_cache_content.html", freed=freed) if page.is_partial else page.redirect(PATH)


async def _show(page: Page, template: str, freed: int | None = None) -> Response:
    manager = page.services.manager
    listed = await cached_models.list_cached(page.services, ListQuery(all=False))
    everything = await cached_models.list_cached(page.services, ListQuery(all=True))
    leftovers = await page.services.in_disk_thread(partial(manager.prune, dry_run=True))
    return page.render(
        template,
        models=listed.models,
        others=[model for model in everything.models if model.state == "unverified"],
        total_size=listed.total_size,
        leftovers=leftovers,
        directory=page.services.settings.hubs.cache_dir,
        freed=freed,
    )
