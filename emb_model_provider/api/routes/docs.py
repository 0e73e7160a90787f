"""GET /docs: Swagger UI from this machine, since a page from a CDN is blank where the CDN is out of reach."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import FileResponse, HTMLResponse

_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}


def router(title: str) -> APIRouter:
    routes = APIRouter(include_in_schema=False)
    directory = _asset_directory()

    @routes.get("/docs")
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=title,
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="docs/favicon-32x32.png",
            # Swagger UI would send the API's description to its makers' validator.
            swagger_ui_parameters={"validatorUrl": None},
        )

    for name, media_type in _ASSETS.items():
        _serve_file(routes, f"/docs/{name}", directory / name, media_type)
    return routes


def _serve_file(routes: APIRouter, path: str, file: Path, media_type: str) -> None:
    @routes.get(path)
    async def asset() -> FileResponse:
        return FileResponse(file, media_type=media_type)


def _asset_directory() -> Path:
    """Find the files of the fastapi-swagger distribution, which are all that is wanted of it."""
    spec = find_spec("fastapi_swagger")
    if spec is None or spec.origin is None:
        raise RuntimeError("fastapi-swagger is not installed: run `uv sync`.")
    return Path(spec.origin).parent / "resources"
