"""Requests and responses of the Batch API, as OpenAI's clients send and read them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MIN_EXPIRY_S, MAX_EXPIRY_S = 3600, 30 * 24 * 3600
ExpirySeconds = Annotated[int, Field(ge=MIN_EXPIRY_S, le=MAX_EXPIRY_S)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]], Field(max_length=16)
]

UPLOAD_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {
                            "type": "string",
                            "format": "binary",
                            "description": "A JSONL file: one request in each line.",
                        },
                        "purpose": {"const": "batch"},
                        "expires_after[anchor]": {"const": "created_at"},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": MIN_EXPIRY_S,
                            "maximum": MAX_EXPIRY_S,
                            "description": "When the file is removed, after it was created. Default: 30 days.",
                        },
                    },
                }
            }
        },
    }
}
"""The `openapi_extra` of the upload. Its body is parsed while it arrives."""


class FileObject(BaseModel):
    """A file."""

    id: str
    object: Literal["file"] = "file"
    bytes: int = Field(description="Its size.")
    created_at: int = Field(description="Unix time in seconds, as all times.")
    expires_at: int | None = Field(description="When it is removed. Null: not before it is deleted.")
    filename: str
    purpose: str = Field(description="batch, or batch_output if the service has written it.")
    status: Literal["processed"] = Field(default="processed", description="Deprecated, and required by clients.")
    status_details: None = None


class FileList(BaseModel):
    """Files of the caller."""

    object: Literal["list"] = "list"
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool


class FileDeleted(BaseModel):
    """A file that was removed."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class ExpiresAfter(BaseModel):
    """When the files of a batch are removed."""

    anchor: Literal["created_at"]
    seconds: ExpirySeconds


class BatchRequest(BaseModel):
    """A request for a batch. Unknown fields are ignored; null is the same as absent."""

    model_config = ConfigDict(
        use_attribute_docstrings=True,
        json_schema_extra={
            "examples": [{"input_file_id": "file-abc123", "endpoint": "/v1/embeddings", "completion_window": "24h"}]
        },
    )

    input_file_id: str
    """The id of an uploaded file with one request in each line: `{"custom_id": "1", "method": "POST", "url": "/v1/embeddings",
    "body": {"input": "hello"}}`. Up to 50,000 lines, with up to 50,000 inputs of embeddings."""
    endpoint: Literal["/v1/embeddings", "/v1/rerank"]
    """The route that answers each of them."""
    completion_window: Literal["24h"]
    """After this time the batch expires. What was computed until then is kept."""
    metadata: Metadata | None = None
    """Up to 16 texts of the caller, which the batch keeps."""
    output_expires_after: ExpiresAfter | None = None
    """When the files with the results are removed, after they were created. Default: 30 days."""


class BatchErrorObject(BaseModel):
    """Why a batch was not started."""

    code: str
    line: int | None = Field(description="The line of the input file, counted from 1.")
    message: str
    param: str | None


class BatchErrors(BaseModel):
    """The problems of an input file, the first ones if there are many."""

    object: Literal["list"] = "list"
    data: list[BatchErrorObject]


class BatchRequestCounts(BaseModel):
    """How many requests of a batch were answered."""

    total: int
    completed: int
    failed: int


class BatchInputTokens(BaseModel):
    """For clients of OpenAI."""

    cached_tokens: int = 0


class BatchOutputTokens(BaseModel):
    """For clients of OpenAI."""

    reasoning_tokens: int = 0


class BatchUsage(BaseModel):
    """Tokens of the answered requests of a batch."""

    input_tokens: int
    input_tokens_details: BatchInputTokens = BatchInputTokens()
    output_tokens: int = 0
    output_tokens_details: BatchOutputTokens = BatchOutputTokens()
    total_tokens: int


class BatchObject(BaseModel):
    """A batch. All times are Unix times in seconds, and null until they are known."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    model: str | None = Field(description="The model of the requests; null if they name none, or several.")
    errors: BatchErrors | None = Field(description="Why it was not started; only of a failed batch.")
    input_file_id: str
    completion_window: str
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    output_file_id: str | None = Field(description="The file with the responses of the requests that succeeded.")
    error_file_id: str | None = Field(description="The file with the other requests.")
    created_at: int
    in_progress_at: int | None
    expires_at: int | None = Field(description="When it expires if it is not completed.")
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: BatchRequestCounts
    usage: BatchUsage
    metadata: dict[str, str] | None
    pause_reason: str | None = Field(
        description="Why it waits now, for example for space on the disk; null if it does not."
    )


class BatchList(BaseModel):
    """Batches of the caller, the latest first."""

    object: Literal["list"] = "list"
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
