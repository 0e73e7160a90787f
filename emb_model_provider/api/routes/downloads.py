"""POST /api/models/download, and the jobs that it starts: looked at, watched as events, cancelled."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter, Query
from starlette.requests import Request  # noqa: TC002 - FastAPI reads it
from starlette.responses import JSONResponse, Response, StreamingResponse

from emb_model_provider.api.errors import code_of
from emb_model_provider.api.routes.loaded_models import spec_named
from emb_model_provider.api.schemas.management import DownloadJob, DownloadJobList, DownloadQuery
from emb_model_provider.api.schemas.openai import error_responses
from emb_model_provider.errors import JobNotFoundError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from emb_model_provider.management.downloads import DownloadJobs, Job
    from emb_model_provider.settings import Settings

JOBS = "/api/models/jobs"

_LOOK_EVERY_S = 0.1
_TELL_EVERY_S = 0.5
_KEEP_ALIVE_S = 15.0
"""Proxies close what is silent for longer; 30 s and 60 s are usual."""
_RETRY_MS = 3000


def router(settings: Settings, jobs: DownloadJobs, is_stopping: Callable[[], bool]) -> APIRouter:
    routes = APIRouter(tags=["management"])

    @routes.post(
        "/api/models/download",
        summary="Begin to download a model",
        description="Two downloads of one model are one job, and a job that failed can be asked for again.",
        response_model=DownloadJob,
        status_code=202,
        responses=error_responses(400, 401, 403, 429),
    )
    async def download(query: Annotated[DownloadQuery, Query()]) -> Response:
        # Choosing looks at the disk for directories.
        spec = await asyncio.to_thread(spec_named, settings, query)
        job = described(jobs.start(spec, force=query.force, compiling=query.compile))
        return JSONResponse(job.model_dump(mode="json"), 202, headers={"location": job.url})

    @routes.get(JOBS, summary="List the downloads", responses=error_responses(401, 403))
    async def list_jobs() -> DownloadJobList:
        return DownloadJobList(jobs=[described(job) for job in jobs.list()])

    @routes.get(f"{JOBS}/{{job_id}}", summary="Look at a download", responses=error_responses(401, 403, 404))
    async def look(job_id: str) -> DownloadJob:
        return described(jobs.get(job_id))

    @routes.delete(
        f"{JOBS}/{{job_id}}",
        summary="Cancel a download",
        description="One that runs is `cancelling` until it has ended and its partial files are gone. One that is over "
        "stays as it is.",
        responses=error_responses(401, 403, 404),
    )
    async def cancel(job_id: str) -> DownloadJob:
        return described(jobs.cancel(job_id))

    @routes.get(
        f"{JOBS}/{{job_id}}/events",
        summary="Watch a download",
        description="Server-sent events, each named `progress`, `done`, `failed` or `cancelled`, with the job as JSON. "
        "The first comes at once. The stream ends after the last.",
        response_class=StreamingResponse,
        responses={
            200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
            **error_responses(401, 403, 404),
        },
    )
    async def watch(request: Request, job_id: str) -> Response:
        jobs.get(job_id)
        headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
        if request.scope["emb_provider.record"].method == "HEAD":
            return Response(media_type="text/event-stream", headers=headers)
        return StreamingResponse(
            _events(jobs, job_id, is_stopping), media_type="text/event-stream", headers=headers
        )

    return routes


async def _events(jobs: DownloadJobs, job_id: str, is_stopping: Callable[[], bool]) -> AsyncIterator[str]:
    """Yield a job's events until it is over. It is looked at now and then: it tells of every piece that arrives."""
    yield f"retry: {_RETRY_MS}\n\n"
    told: Job | None = None
    told_at = float("-inf")
    # A stream that goes on would hold up the end of the service for as long as requests have.
    while not is_stopping():
        try:
            job = jobs.get(job_id)
        except JobNotFoundError:
            return
        now = time.monotonic()
        if job.is_over:
            yield _event(job.state, job)
            return
        if job != told and now >= told_at + _TELL_EVERY_S:
            told, told_at = job, now
            yield _event("progress", job)
        elif now >= told_at + _KEEP_ALIVE_S:
            told_at = now
            yield ": still here\n\n"
        await asyncio.sleep(_LOOK_EVERY_S)


def _event(name: str, job: Job) -> str:
    return f"event: {name}\ndata: {described(job).model_dump_json()}\n\n"


def described(job: Job) -> DownloadJob:
    return DownloadJob(
        id=job.id,
        state=job.state,
        model_name=job.model_name,
        source=job.source,
        asked_revision=job.asked_revision,
        revision=job.revision,
        force=job.force,
        compile=job.compile,
        precision=job.precision,
        phase=job.phase,
        done_bytes=job.done_bytes,
        total_bytes=job.total_bytes,
        bytes_per_s=job.bytes_per_s,
        cancelling=job.cancelling,
        error=job.error,
        error_code=code_of(job.failure) if job.failure is not None else None,
        created=job.created,
        started=job.started,
        ended=job.ended,
        path=str(job.path) if job.path is not None else None,
        notes=list(job.notes),
        url=f"{JOBS}/{job.id}",
    )
