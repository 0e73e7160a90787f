"""`/console/batches`: the batches of all API keys."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from emb_model_provider.api.console.page import HEADERS, ConsoleRoute, Page, PageDep
from emb_model_provider.api.routes.files import content_response
from emb_model_provider.batch_jobs.types import UNFINISHED

PATH = "/console/batches"

_SHOWN = 50

router = APIRouter(route_class=ConsoleRoute, include_in_schema=False)


@router.get(PATH)
async def batches(page: PageDep) -> Response:
    return await _show(page, "batches.html")


@router.get(f"{PATH}/list")
async def list_batches(page: PageDep) -> Response:
    return await _show_list(page)


@router.post(f"{PATH}/cancel")
async def cancel(page: PageDep) -> Response:
    batch_id = (await page.form()).get("batch", "")
    jobs = await page.services.batches.open()
    await page.services.in_disk_thread(lambda: jobs.batches.cancel(None, batch_id))
    page.services.batches.wake()
    return await _show_list(page)


@router.get(f"{PATH}/files/{{file_id}}")
async def download(file_id: str, page: PageDep) -> Response:
    response = await content_response(page.services, None, file_id)
    response.headers.update(HEADERS)
    return response


async def _show_list(page: Page) -> Response:
    return await _show(page, "_batches_list.html") if page.is_partial else page.redirect(PATH)


async def _show(page: Page, template: str) -> Response:
    jobs = await page.services.batches.open()
    found = (await page.services.in_disk_thread(lambda: jobs.batches.list(None, limit=_SHOWN))).items
    is_changing = any(batch.state in UNFINISHED for batch in found)
    return page.render(template, batches=found, unfinished=UNFINISHED, is_changing=is_changing)
