"""`/api/models/download`, `…/transfer` and `…/jobs`: downloads and transfers are started, listed, watched and cancelled."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Annotated

from fastapi import APIRouter
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from emb_model_provider.api.dependencies import ServicesDep, get_record
from emb_model_provider.api.parameters import documented, from_query_or_body
from emb_model_provider.api.routes.loaded_models import resolve_requested_model
from emb_model_provider.api.schemas.management import DownloadJob, DownloadJobList, DownloadQuery, TransferQuery
from emb_model_provider.api.schemas.openai import error_responses
from emb_model_provider.errors import JobNotFoundError, NotAllowedError
from emb_model_provider.transfer.location import parse_destination, parse_source
from emb_model_provider.transfer.session import TransferOptions
from emb_model_provider.transfer.transfer import Transfer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from emb_model_provider.management.downloads import DownloadJobs
    from emb_model_provider.management.types import DownloadRecord

JOBS = "/api/models/jobs"

_POLL_S = 0.1
_EVENT_EVERY_S = 0.5
_KEEP_ALIVE_S = 15.0
"""Proxies usually close connections that are silent for 30 or 60 seconds."""
_RECONNECT_MS = 3000

router = APIRouter(tags=["management"])


@router.post(
    "/api/models/download",
    summary="Start to download a model",
    description="If the model is being downloaded already, the existing job is returned. A failed download can be started "
    "again.",
    response_model=DownloadJob,
    status_code=202,
    responses=error_responses(400, 401, 403, 429),
    openapi_extra=documented(DownloadQuery),
)
async def download(
    services: ServicesDep, query: Annotated[DownloadQuery, from_query_or_body(DownloadQuery)]
) -> Response:
    # On a thread, because it checks whether the name is a directory.
    spec = await asyncio.to_thread(resolve_requested_model, services.settings, query)
    return _accepted(services.jobs.start(spec, force=query.force, compiling=query.compile))


@router.post(
    "/api/models/transfer",
    summary="Start to copy a repository from one hub to another",
    description="Files are streamed, and only those that the destination lacks are sent. If the repository is being copied "
    "to this destination already, the existing job is returned. A transfer that failed or was cancelled continues when it is "
    "started again.",
    response_model=DownloadJob,
    status_code=202,
    responses=error_responses(400, 401, 403, 429),
    openapi_extra=documented(TransferQuery),
)
async def transfer(
    services: ServicesDep, query: Annotated[TransferQuery, from_query_or_body(TransferQuery)]
) -> Response:
    source = parse_source(query.model_name)
    destination = parse_destination(query.destination, source)
    if destination.site == "directory":
        raise NotAllowedError("A repository is not copied to a directory over HTTP. Use `emb-provider transfer`.")
    options = TransferOptions(
        license=query.license,
        commit_message=query.commit_message,
        has_permission=query.i_have_permission,
        overwrite_card=query.overwrite_card,
    )
    job = services.jobs.start_transfer(
        Transfer(services.settings, options).job(source, destination),
        model_name=source.name,
        source=source.site,
        asked_revision=source.revision,
        destination=str(destination),
    )
    return _accepted(job)


@router.get(JOBS, summary="List the downloads and transfers", responses=error_responses(401, 403))
async def list_jobs(services: ServicesDep) -> DownloadJobList:
    return DownloadJobList(jobs=[_with_url(job) for job in services.jobs.list()])


@router.get(f"{JOBS}/{{job_id}}", summary="Describe a download or a transfer", responses=error_responses(401, 403, 404))
async def look(services: ServicesDep, job_id: str) -> DownloadJob:
    return _with_url(services.jobs.get(job_id))


@router.delete(
    f"{JOBS}/{{job_id}}",
    summary="Cancel a download or a transfer",
    description="A running job is `cancelling` until it has removed its partial files. A job that has ended does not "
    "change.",
    responses=error_responses(401, 403, 404),
)
async def cancel(services: ServicesDep, job_id: str) -> DownloadJob:
    return _with_url(services.jobs.cancel(job_id))


@router.get(
    f"{JOBS}/{{job_id}}/events",
    summary="Watch a download or a transfer",
    description="Server-sent events named `progress`, `done`, `failed` or `cancelled`, each with the job as JSON. "
    "The first event is sent at once. The stream ends after `done`, `failed` or `cancelled`.",
    response_class=StreamingResponse,
    responses={
        200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}},
        **error_responses(401, 403, 404),
    },
)
async def watch(services: ServicesDep, request: Request, job_id: str) -> Response:
    services.jobs.get(job_id)
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    if get_record(request).method == "HEAD":  # which must not wait for the end of the job
        return Response(media_type="text/event-stream", headers=headers)
    events = _events(services.jobs, job_id, services.background.is_shutting_down)
    return EventSourceResponse(events, headers=headers)


async def _events(jobs: DownloadJobs, job_id: str, is_shutting_down: Callable[[], bool]) -> AsyncIterator[bytes]:
    """Yield the events of a job until it has ended or the service shuts down.

    The job is polled, because it changes with each block of bytes.
    """
    yield format_sse_event(retry=_RECONNECT_MS)
    sent: DownloadRecord | None = None
    sent_at = float("-inf")
    # An open stream would delay the shutdown by the whole grace period.
    while not is_shutting_down():
        try:
            job = jobs.get(job_id)
        except JobNotFoundError:
            return
        now = time.monotonic()
        if job.is_over:
            yield _event(job.state, job)
            return
        if job != sent and now >= sent_at + _EVENT_EVERY_S:
            sent, sent_at = job, now
            yield _event("progress", job)
        elif now >= sent_at + _KEEP_ALIVE_S:
            sent_at = now
            yield KEEPALIVE_COMMENT
        await asyncio.sleep(_POLL_S)


def _accepted(record: DownloadRecord) -> Response:
    job = _with_url(record)
    # Relative to the URL of the request, so that it is right behind a proxy that adds a prefix to all paths.
    return JSONResponse(job.model_dump(mode="json"), 202, headers={"location": f"jobs/{job.id}"})


def _event(name: str, job: DownloadRecord) -> bytes:
    return format_sse_event(event=name, data_str=_with_url(job).model_dump_json())


def _with_url(job: DownloadRecord) -> DownloadJob:
    return DownloadJob(**dict(job), url=f"{JOBS}/{job.id}")
