"""`/console/models`: download, load and unload models."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, get_args

from fastapi import APIRouter
from starlette.responses import Response

from emb_model_provider.api.console.page import ConsoleRoute, Page, PageDep, parse_form
from emb_model_provider.api.console.recommended import suggested_models
from emb_model_provider.api.routes import loaded_models
from emb_model_provider.api.schemas.management import DownloadQuery, LoadQuery, UnloadQuery
from emb_model_provider.model_spec import Precision
from emb_model_provider.registry import State

if TYPE_CHECKING:
    from emb_model_provider.management.types import DownloadRecord
    from emb_model_provider.registry import ModelStatus

PATH = "/console/models"

_MAX_ENDED_JOBS = 5
_SETTLED = (State.READY, State.UNLOADED, State.FAILED, State.HUNG)
"""States that do not change by themselves within seconds."""

router = APIRouter(route_class=ConsoleRoute, include_in_schema=False)


@router.get(PATH)
async def models(page: PageDep) -> Response:
    on_disk = await page.services.in_disk_thread(page.services.manager.list)
    complete = {model.model_name for model in on_disk if model.state == "complete"}
    return page.render(
        "models.html", suggested=suggested_models(), on_disk=complete, precisions=get_args(Precision), **_state(page)
    )


@router.get(f"{PATH}/state")
async def state(page: PageDep) -> Response:
    return _show_state(page)


@router.post(f"{PATH}/download")
async def download(page: PageDep) -> Response:
    query = parse_form(DownloadQuery, await page.form())
    # On a thread, because it checks whether the name is a directory.
    spec = await asyncio.to_thread(loaded_models.resolve_requested_model, page.services.settings, query)
    page.services.jobs.start(spec, force=query.force, compiling=query.compile)
    return _show_state(page)


@router.post(f"{PATH}/cancel")
async def cancel(page: PageDep) -> Response:
    page.services.jobs.cancel((await page.form()).get("job", ""))
    return _show_state(page)


@router.post(f"{PATH}/load")
async def load(page: PageDep) -> Response:
    fields = {**await page.form(), "wait": "false"}
    await loaded_models.load(page.services, parse_form(LoadQuery, fields))
    return _show_state(page)


@router.post(f"{PATH}/unload")
async def unload(page: PageDep) -> Response:
    registry = page.services.registry
    query = parse_form(UnloadQuery, await page.form())
    alias = registry.alias_of(query.model_name)
    # In the background, because current requests are answered first.
    page.services.background.start(registry.remove(alias) if query.forget else registry.unload(alias))
    await asyncio.sleep(0)  # lets the task set the state that is shown
    return _show_state(page)


def _show_state(page: Page) -> Response:
    return page.render("_models_state.html", **_state(page)) if page.is_partial else page.redirect(PATH)


def _state(page: Page) -> dict[str, Any]:
    jobs = page.services.jobs.list()
    ended = [job for job in jobs if job.is_over][:_MAX_ENDED_JOBS]
    statuses = page.services.registry.statuses()
    return {
        "jobs": [job for job in jobs if not job.is_over] + ended,
        "statuses": statuses,
        "is_changing": _is_changing(jobs, statuses),
    }


def _is_changing(jobs: list[DownloadRecord], statuses: list[ModelStatus]) -> bool:
    return any(not job.is_over for job in jobs) or any(status.state not in _SETTLED for status in statuses)
