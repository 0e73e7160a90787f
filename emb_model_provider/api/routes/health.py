"""GET /health, /ready and /metrics: for machines that watch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from emb_model_provider.api.schemas import Health, ModelReadiness, Readiness

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
