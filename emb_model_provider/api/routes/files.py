"""`/v1/files`: the input files of batches, which are written to disk while they arrive, and the files of their results."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from fastapi import APIRouter, Query
from starlette.requests import Request
from starlette.responses import FileResponse, Response

from emb_model_provider.api.dependencies import Services, ServicesDep, get_record
from emb_model_provider.api.errors import error_response
from emb_model_provider.api.fields import unsupported_value
from emb_model_provider.api.multipart import FormParser
from emb_model_provider.api.paths import FILES
from emb_model_provider.api.schemas.batches import (
    MAX_EXPIRY_S,
    MIN_EXPIRY_S,
    UPLOAD_FORM,
    FileDeleted,
    FileList,
    FileObject,
)
from emb_model_provider.api.schemas.openai import error_responses
from emb_model_provider.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emb_model_provider.batch_jobs.files import StoredFile, Upload

router = APIRouter(tags=["batches"])

_PURPOSE = "batch"
_PURPOSES = (_PURPOSE, "batch_output")
_DEFAULT_EXPIRY_S = MAX_EXPIRY_S
_PIECE_BYTES = 256 * 1024
"""How much of an upload is in memory before it is parsed and written."""


@router.post(
    FILES,
    summary="Upload the requests of a batch",
    responses=error_responses(400, 401, 403, 408, 413, 415, 503, 507),
    openapi_extra=UPLOAD_FORM,
)
async def create_file(request: Request, services: ServicesDep) -> FileObject:
    """The body is a form with `file`, a JSONL file with one request in each line, and `purpose`, which is `batch`."""
    store = (await services.batches.open()).files
    owner = get_record(request).key_name
    upload: Upload | None = None
    with ExitStack() as stack:

        def open_file(name: str) -> Upload:
            nonlocal upload
            if "purpose" in form.fields:
                _check_purpose(form.fields)  # before the file is read, if it comes first
            upload = stack.enter_context(store.upload(owner, name))
            return upload

        form = FormParser(request.headers.get("content-type", ""), "file", open_file)
        buffer = bytearray()
        async for piece in request.stream():
            buffer += piece
            if len(buffer) >= _PIECE_BYTES:
                await services.in_disk_thread(partial(form.feed, bytes(buffer)))
                buffer.clear()
        await services.in_disk_thread(partial(form.feed, bytes(buffer)))
        form.close()
        _check_purpose(form.fields)
        assert upload is not None  # noqa: S101 - `close` has checked it
        upload.expire_after(_expiry(form.fields))
        return _describe(await services.in_disk_thread(upload.commit))


@router.get(FILES, summary="List the files", responses=error_responses(400, 401, 403, 404, 503))
async def list_files(
    request: Request,
    services: ServicesDep,
    after: Annotated[str | None, Query(description="The id of the last file of the previous page.")] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Annotated[Literal["asc", "desc"], Query(description="By the time of creation.")] = "desc",
    purpose: str | None = None,
) -> FileList:
    """Those of the API key of the request."""
    store = (await services.batches.open()).files
    owner = get_record(request).key_name
    if purpose not in (None, *_PURPOSES):
        return FileList(data=[], first_id=None, last_id=None, has_more=False)
    page = await services.in_disk_thread(
        lambda: store.list(owner, after=after, limit=limit, order=order, purpose=purpose)
    )
    data = [_describe(file) for file in page.items]
    return FileList(
        data=data, first_id=data[0].id if data else None, last_id=data[-1].id if data else None, has_more=page.has_more
    )


@router.get(FILES + "/{file_id}", summary="Describe a file", responses=error_responses(401, 403, 404, 503))
async def get_file(file_id: str, request: Request, services: ServicesDep) -> FileObject:
    store = (await services.batches.open()).files
    owner = get_record(request).key_name
    return _describe(await services.in_disk_thread(lambda: store.get(owner, file_id)))


@router.delete(FILES + "/{file_id}", summary="Delete a file", responses=error_responses(401, 403, 404, 409, 503))
async def delete_file(file_id: str, request: Request, services: ServicesDep) -> FileDeleted:
    """Not as long as a batch reads it."""
    store = (await services.batches.open()).files
    owner = get_record(request).key_name
    await services.in_disk_thread(lambda: store.delete(owner, file_id))
    return FileDeleted(id=file_id)


@router.get(
    FILES + "/{file_id}/content",
    summary="Download a file",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
        **error_responses(401, 403, 404, 500, 503),
    },
)
async def get_content(file_id: str, request: Request, services: ServicesDep) -> Response:
    return await content_response(services, get_record(request).key_name, file_id)


async def content_response(services: Services, owner: str | None, file_id: str) -> Response:
    """Return the content of a file as a response, which is read while it is sent."""
    store = (await services.batches.open()).files
    file = await services.in_disk_thread(lambda: store.get(owner, file_id))
    path = store.path(file.id)
    if not await services.in_disk_thread(path.is_file):
        return error_response(
            500,
            f"The content of the file {file.id} is missing. All services that use one database must share the directory "
            "EMB_PROVIDER_BATCH_DIR.",
            type="server_error",
            code="content_missing",
        )
    return FileResponse(path, media_type="application/octet-stream", filename=file.filename)


def _describe(file: StoredFile) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=int(file.created_at),
        expires_at=int(file.expires_at) if file.expires_at is not None else None,
        filename=file.filename,
        purpose=file.purpose,
    )


def _check_purpose(fields: Mapping[str, str]) -> None:
    purpose = fields.get("purpose")
    if purpose is None:
        raise RequestError(
            "Missing required parameter: 'purpose'. Send purpose=batch.",
            param="purpose",
            code="missing_required_parameter",
        )
    if purpose != _PURPOSE:
        raise unsupported_value("purpose", purpose, f"'{_PURPOSE}'")


def _expiry(fields: Mapping[str, str]) -> int:
    """Return after how many seconds a file is removed."""
    anchor, seconds = (fields.get(f"expires_after[{name}]") for name in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return _DEFAULT_EXPIRY_S
    if anchor != "created_at":
        raise unsupported_value("expires_after[anchor]", anchor, "'created_at'")
    return checked_expiry("expires_after[seconds]", int(seconds) if seconds and seconds.isdecimal() else seconds)


def checked_expiry(name: str, value: object) -> int:
    """Return a valid number of seconds after which a file is removed, else raise RequestError."""
    if type(value) is not int or not MIN_EXPIRY_S <= value <= MAX_EXPIRY_S:
        raise unsupported_value(name, value, f"{MIN_EXPIRY_S} to {MAX_EXPIRY_S}, in seconds")
    return value
