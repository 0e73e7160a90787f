"""`/console/models`: download, load and unload models."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args

from fastapi import APIRouter
from starlette.responses import Response

from emb_model_provider.api.console.page import ConsoleRoute, Page, PageDep, parse_form
from emb_model_provider.api.console.recommended import SuggestedKind, suggested_models
from emb_model_provider.api.console.texts import texts_in
from emb_model_provider.api.routes import loaded_models
from emb_model_provider.api.schemas.management import DownloadQuery, LoadQuery, UnloadQuery
from emb_model_provider.errors import DirectoryNotAllowedError, NotAllowedError
from emb_model_provider.formatting import quote
from emb_model_provider.model_spec import Precision
from emb_model_provider.registry import State

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emb_model_provider.management.types import DownloadRecord
    from emb_model_provider.registry import ModelStatus

PATH = "/console/models"

_KINDS = get_args(SuggestedKind)
_MAX_ENDED_JOBS = 5
_SETTLED = (State.READY, State.UNLOADED, State.FAILED, State.HUNG)
"""States that do not change by themselves within seconds."""

router = APIRouter(route_class=ConsoleRoute, include_in_schema=False)


@router.get(PATH)
async def models(page: PageDep) -> Response:
    on_disk = await page.services.in_disk_thread(page.services.manager.list)
    complete = {model.model_name for model in on_disk if model.state == "complete"}
    kind = page.request.query_params.get("kind")
    return page.render(
        "models.html",
        suggested=[model for model in suggested_models() if kind not in _KINDS or model.kind == kind],
        kinds=_KINDS,
        kind=kind if kind in _KINDS else None,
        on_disk=complete,
        precisions=get_args(Precision),
        **_state(page),
    )


@router.get(f"{PATH}/state")
async def state(page: PageDep) -> Response:
    return _show_state(page)


@router.post(f"{PATH}/download")
async def download(page: PageDep) -> Response:
    query = parse_form(DownloadQuery, await page.form())
    with _advice_for_forms(page, query.model_name):
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
    fields = await page.form()
    # A model is kept after it is loaded; the form for that is shown for loaded models only.
    query = parse_form(LoadQuery, {**fields, "wait": "true" if "keep" in fields else "false"})
    with _advice_for_forms(page, query.model_name):
        await loaded_models.load(page.services, query)
    return _show_state(page)


@router.post(f"{PATH}/unload")
async def unload(page: PageDep) -> Response:
    query = parse_form(UnloadQuery, await page.form())
    page.services.registry.alias_of(query.model_name)  # raises an error for an unknown name
    # In the background, because current requests are answered first.
    page.services.background.start(loaded_models.unload(page.services, query))
    await asyncio.sleep(0)  # lets the task set the state that is shown
    return _show_state(page)


@contextmanager
def _advice_for_forms(page: Page, name: str) -> Iterator[None]:
    """Raise an error about a directory with advice that applies to a form, not to a command or a parameter."""
    t = texts_in(page.language)
    try:
        yield
    except DirectoryNotAllowedError:
        raise NotAllowedError(t("models.directory", name=quote(name))) from None


def _show_state(page: Page) -> Response:
    return page.render("_models_state.html", **_state(page)) if page.is_partial else page.redirect(PATH)


def _state(page: Page) -> dict[str, Any]:
    jobs = page.services.jobs.list()
    ended = [job for job in jobs if job.is_over][:_MAX_ENDED_JOBS]
    statuses = page.services.registry.statuses()
    return {
        "jobs": [job for job in jobs if not job.is_over] + ended,
        "statuses": statuses,
        "kept": page.services.kept.aliases,
        "is_changing": _is_changing(jobs, statuses),
    }


def _is_changing(jobs: list[DownloadRecord], statuses: list[ModelStatus]) -> bool:
    return any(not job.is_over for job in jobs) or any(
        status.state not in _SETTLED or status.progress is not None for status in statuses
    )
