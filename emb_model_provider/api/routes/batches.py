"""`/v1/batches`: files of requests that are answered in the background."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from fastapi import APIRouter, Query
from starlette.requests import Request

from emb_model_provider.api.dependencies import ServicesDep, get_record
from emb_model_provider.api.fields import optional, read_fields, require, unsupported_value
from emb_model_provider.api.routes.files import checked_expiry
from emb_model_provider.api.schemas.batches import (
    BatchErrorObject,
    BatchErrors,
    BatchList,
    BatchObject,
    BatchRequest,
    BatchRequestCounts,
    BatchUsage,
)
from emb_model_provider.api.schemas.openai import error_responses, request_body

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emb_model_provider.api.batch_service import OpenBatches
    from emb_model_provider.batch_jobs.batches import Batch

router = APIRouter(tags=["batches"])

PATH = "/v1/batches"


@router.post(
    PATH,
    summary="Create a batch",
    responses=error_responses(400, 401, 403, 404, 408, 413, 415, 429, 503, 507),
    openapi_extra=request_body(BatchRequest),
)
async def create_batch(request: Request, services: ServicesDep) -> BatchObject:
    """Its requests are answered while the service has no others. They are checked first, in the state `validating`."""
    fields = await read_fields(request, services)
    input_file_id, endpoint = _text(fields, "input_file_id"), _text(fields, "endpoint")
    completion_window = _text(fields, "completion_window")
    metadata, output_expires_after_s = _metadata(fields), _output_expiry(fields)
    jobs = await services.batches.open()
    owner = get_record(request).key_name
    batch = await services.in_disk_thread(
        lambda: jobs.batches.create(
            owner,
            input_file_id=input_file_id,
            endpoint=endpoint,
            completion_window=completion_window,
            metadata=metadata,
            output_expires_after_s=output_expires_after_s,
        )
    )
    services.batches.wake()
    return describe(batch, jobs)


@router.get(PATH, summary="List the batches", responses=error_responses(400, 401, 403, 404, 503))
async def list_batches(
    request: Request,
    services: ServicesDep,
    after: Annotated[str | None, Query(description="The id of the last batch of the previous page.")] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> BatchList:
    """Those of the API key of the request, the latest first."""
    jobs = await services.batches.open()
    owner = get_record(request).key_name
    page = await services.in_disk_thread(lambda: jobs.batches.list(owner, after=after, limit=limit))
    data = [describe(batch, jobs) for batch in page.items]
    return BatchList(
        data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=page.has_more
    )


@router.get(PATH + "/{batch_id}", summary="Describe a batch", responses=error_responses(401, 403, 404, 503))
async def get_batch(batch_id: str, request: Request, services: ServicesDep) -> BatchObject:
    jobs = await services.batches.open()
    owner = get_record(request).key_name
    return describe(await services.in_disk_thread(lambda: jobs.batches.get(owner, batch_id)), jobs)


@router.post(PATH + "/{batch_id}/cancel", summary="Cancel a batch", responses=error_responses(401, 403, 404, 409, 503))
async def cancel_batch(batch_id: str, request: Request, services: ServicesDep) -> BatchObject:
    """What was computed is kept, in the files of its results."""
    jobs = await services.batches.open()
    owner = get_record(request).key_name
    batch = await services.in_disk_thread(lambda: jobs.batches.cancel(owner, batch_id))
    services.batches.wake()
    return describe(batch, jobs)


def describe(batch: Batch, jobs: OpenBatches) -> BatchObject:
    """Return a batch in the form of the API."""
    errors = [BatchErrorObject(code=each.code, line=each.line, message=each.message, param=each.param) for each in batch.errors]  # fmt: skip
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        model=batch.model,
        errors=BatchErrors(data=errors) if errors else None,
        input_file_id=batch.input_file_id,
        completion_window=batch.completion_window,
        status=batch.state,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=int(batch.created_at),
        in_progress_at=_seconds(batch.in_progress_at),
        expires_at=_seconds(batch.expires_at),
        finalizing_at=_seconds(batch.finalizing_at),
        completed_at=_seconds(batch.completed_at),
        failed_at=_seconds(batch.failed_at),
        expired_at=_seconds(batch.expired_at),
        cancelling_at=_seconds(batch.cancelling_at),
        cancelled_at=_seconds(batch.cancelled_at),
        request_counts=BatchRequestCounts(total=batch.total, completed=batch.completed, failed=batch.failed),
        usage=BatchUsage(input_tokens=batch.tokens, total_tokens=batch.tokens),
        metadata=dict(batch.metadata) if batch.metadata is not None else None,
        pause_reason=batch.pause_reason or jobs.worker.pauses.get(batch.id),
    )


def _seconds(time: float | None) -> int | None:
    return int(time) if time is not None else None


def _text(fields: Mapping[str, Any], name: str) -> str:
    require(fields, name)
    return optional(fields, str, name) or ""


def _metadata(fields: Mapping[str, Any]) -> Mapping[str, str] | None:
    metadata = fields.get("metadata")
    if metadata is None or isinstance(metadata, dict):
        return metadata
    raise unsupported_value("metadata", metadata, "an object of strings", code="invalid_type")


def _output_expiry(fields: Mapping[str, Any]) -> int | None:
    """Return after how many seconds the files of the results are removed; None: the default."""
    value = fields.get("output_expires_after")
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("anchor") != "created_at":
        raise unsupported_value("output_expires_after", value, '{"anchor": "created_at", "seconds": …}')
    return checked_expiry("output_expires_after.seconds", value.get("seconds"))
