"""`/console`: what is served, and how it is doing."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter
from fastapi.sse import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.responses import FileResponse, Response

from emb_model_provider.api.console.page import HEADERS, ConsoleRoute, PageDep
from emb_model_provider.api.console.rendering import STATIC
from emb_model_provider.api.console.sampler import live_values
from emb_model_provider.api.console.snippets import curl_command

_MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
_ASSETS = {path.name for path in STATIC.iterdir()}

router = APIRouter(route_class=ConsoleRoute, include_in_schema=False)


@router.get("/console")
@router.get("/console/")
async def overview(page: PageDep) -> Response:
    registry, server = page.services.registry, page.services.settings.server
    body = {"model": registry.default_alias, "input": "hello"}
    curl = curl_command(page.service_url, body, needs_key=bool(server.accepted_keys))
    return page.render("overview.html", curl=curl, **live_values(page.services))


@router.get("/console/live")
async def live(page: PageDep) -> Response:
    policy, headers, background = page.console.policy, page.request.headers, page.services.background
    was_signed_in = page.is_signed_in

    def is_over() -> bool:
        return background.is_shutting_down() or (was_signed_in and policy.session_token(headers) is None)

    events = page.console.sampler.events(page.language, is_over)
    return EventSourceResponse(events, headers={**HEADERS, "x-accel-buffering": "no"})


@router.get("/console/static/{name}")
async def static(name: str) -> Response:
    if name not in _ASSETS:
        raise HTTPException(404)
    headers = {**HEADERS, "cache-control": "public, max-age=31536000, immutable"}
    return FileResponse(STATIC / name, media_type=_MEDIA_TYPES[Path(name).suffix], headers=headers)
