"""The routers of the console, in the order in which they are asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.responses import Response

from emb_model_provider.api.console import batches, cache, models, overview, playground, settings, sign_in
from emb_model_provider.api.console.page import ConsoleRoute, PageDep

if TYPE_CHECKING:
    from collections.abc import Sequence

_unknown = APIRouter(route_class=ConsoleRoute, include_in_schema=False)


@_unknown.get("/console/{path:path}")
async def not_found(page: PageDep) -> Response:
    """Answer every other path of the console with a page."""
    return page.render("error.html", 404, message=None)


def routers(*, has_batches: bool) -> Sequence[APIRouter]:
    """Return the routers of the console."""
    return (
        overview.router,
        models.router,
        cache.router,
        playground.router,
        *((batches.router,) if has_batches else ()),
        settings.router,
        sign_in.router,
        _unknown,
    )
