"""Routes for monitoring and for people: `/health`, `/ready`, `/metrics` and `/docs`."""

from __future__ import annotations

from importlib.metadata import distribution, version
from typing import TYPE_CHECKING

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response

from emb_model_provider.api.dependencies import Services, ServicesDep
from emb_model_provider.api.paths import CONSOLE
from emb_model_provider.api.schemas.openai import About, Health, ModelReadiness, Readiness

if TYPE_CHECKING:
    from emb_model_provider.registry import ModelStatus

_ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css", "favicon-32x32.png": "image/png"}
"""Files of Swagger UI, with their media types."""

router = APIRouter(tags=["operations"])


@router.get("/", summary="What this service is, and where its documentation is")
async def about(services: ServicesDep) -> About:
    return About(
        name="emb-model-provider",
        version=version("emb-model-provider"),
        description="Embeddings through the APIs of OpenAI, Ollama, TEI and Cohere.",
        base_url="/v1",
        default_model=services.registry.default_alias,
        documentation="/docs",
        models="/v1/models",
        state="/ready",
        console=CONSOLE if services.settings.server.console else None,
    )


@router.get("/health", summary="Check that the process responds")
async def health() -> Health:
    return Health(status="ok")


@router.get(
    "/ready",
    summary="Check that all required models can answer",
    description="By default, the models that are loaded at startup are required. A model that was unloaded counts as ready, "
    "because its next request loads it again.",
    response_model=Readiness,
    responses={503: {"model": Readiness, "description": "A required model cannot answer; its state says why."}},
)
async def ready(services: ServicesDep) -> Response:
    statuses = services.registry.statuses()
    is_ready = all(status.is_available for status in statuses if status.required)
    readiness = Readiness(
        status="ready" if is_ready else "not_ready",
        models={status.spec.alias: _readiness(status) for status in statuses},
    )
    return JSONResponse(readiness.model_dump(exclude_none=True), status_code=200 if is_ready else 503)


@router.get(
    "/metrics",
    summary="Metrics for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def prometheus(services: ServicesDep) -> Response:
    await update_job_figures(services)
    of_others = await services.other_workers.metrics() if services.other_workers is not None else ()
    return Response(services.metrics.text(of_others), media_type="text/plain; version=0.0.4; charset=utf-8")


async def update_job_figures(services: Services) -> None:
    """Let the metrics show what the database of batches holds. Of several workers, only the primary shows it."""
    if not services.is_follower and (figures := await services.batches.figures()) is not None:
        services.metrics.set_jobs(figures.batches.states, figures.file_bytes)


@router.get("/docs", include_in_schema=False)
async def docs(request: Request) -> HTMLResponse:
    return get_swagger_ui_html(
        openapi_url="openapi.json",
        title=request.app.title,
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="docs/favicon-32x32.png",
        # Otherwise Swagger UI sends the API's description to an online validator.
        swagger_ui_parameters={"validatorUrl": None},
    )


@router.get("/docs/{name}", include_in_schema=False)
async def docs_asset(name: str) -> FileResponse:
    if name not in _ASSETS:
        raise HTTPException(404)
    # The distribution is not imported, because only its files are needed.
    path = distribution("fastapi-swagger").locate_file(f"fastapi_swagger/resources/{name}")
    return FileResponse(str(path), media_type=_ASSETS[name])


def _readiness(status: ModelStatus) -> ModelReadiness:
    notes = status.description.notes if status.description is not None else ()
    return ModelReadiness(
        state=status.state.value,
        required=False if status.preload and not status.required else None,
        error=status.error,
        progress=status.progress_text,
        notes=list(notes) or None,
    )
