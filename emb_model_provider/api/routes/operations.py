"""GET /health, /ready and /metrics: for machines that watch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response

from emb_model_provider.api.schemas.openai import Health, ModelReadiness, Readiness

if TYPE_CHECKING:
    from emb_model_provider.observability.metrics import Metrics
    from emb_model_provider.registry import ModelStatus, Registry


def router(registry: Registry, metrics: Metrics) -> APIRouter:
    routes = APIRouter(tags=["operations"])

    @routes.get("/health", summary="Does the process answer?")
    async def health() -> Health:
        return Health(status="ok")

    @routes.get(
        "/ready",
        summary="Can every model that is loaded at the start answer, if need be after it is loaded once more?",
        response_model=Readiness,
        responses={
            503: {"model": Readiness, "description": "Not yet, or not any more; each model's state says why."}
        },
    )
    async def ready() -> Response:
        statuses = registry.statuses()
        is_ready = all(status.is_available for status in statuses if status.preload)
        readiness = Readiness(
            status="ready" if is_ready else "not_ready",
            models={status.spec.alias: _readiness(status) for status in statuses},
        )
        return JSONResponse(readiness.model_dump(exclude_none=True), status_code=200 if is_ready else 503)

    @routes.get(
        "/metrics",
        summary="Figures for Prometheus",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


def _readiness(status: ModelStatus) -> ModelReadiness:
    notes = status.description.notes if status.description is not None else ()
    return ModelReadiness(state=status.state.value, error=status.error, notes=list(notes) or None)


_ASSETS = {
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}


def docs_router(title: str) -> APIRouter:
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
