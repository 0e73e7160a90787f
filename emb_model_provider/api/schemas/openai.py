"""The wire's shapes as OpenAPI describes them. `parsing.py` reads requests; nothing here runs per input."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from emb_model_provider.management.types import FidelityObject

Dimension = Annotated[int, Field(ge=1)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class EmbeddingRequest(BaseModel):
    """Fields that are not listed are ignored; null is the same as absent."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"model": "sentence-transformers/all-MiniLM-L6-v2", "input": ["hello", "你好"]}]
        }
    )

    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=2048)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=2048)]
    ) = Field(
        description="One text, or up to 2048. Token ids are read only where the model's `token_input` allows it."
    )
    model: str | None = Field(
        None, description="An alias, a model's id, or the unique last part of one. Absent: the default model."
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        "float", description="`base64` is padded standard base64 of little-endian float32."
    )
    dimensions: Dimension | None = Field(
        None,
        description="Cut vectors to this size and bring them back to length 1, where the model was trained for it "
        "(Matryoshka) or the operator allows it. Also `output_dimension`.",
    )
    input_type: str | None = Field(
        None,
        description="Chooses one of the model's prompts: query, document, their synonyms (search_query, "
        "retrieval.query, passage, search_document, retrieval.passage), or a prompt's own name. "
        "Also `task` and `prompt_name`.",
    )
    truncate: bool | Literal["NONE", "START", "END"] | None = Field(
        None,
        description="Where an input that is too long is cut; NONE or false refuses it instead. Default: END, unless "
        "the operator set another for the model. How many were cut is told in `x-truncated-inputs`. "
        "Also `truncation`.",
    )
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = Field(
        None, description="Cut inputs to this many tokens; -1 is the model's own limit."
    )
    normalize: bool | None = Field(
        None,
        description="Bring vectors to length 1, or leave them. Absent: the model's own way. Also `normalized`.",
    )
    user: str | None = Field(None, description="Accepted, not used.")


class EmbeddingObject(BaseModel):
    object: Literal["embedding"]
    index: int = Field(description="Place of the input in the request.")
    embedding: list[float] | str = Field(description="Numbers, or base64 where that was asked for.")


class Usage(BaseModel):
    prompt_tokens: int = Field(description="Tokens that were processed, after truncation.")
    total_tokens: int


class EmbeddingResponse(BaseModel):
    object: Literal["list"]
    data: list[EmbeddingObject] = Field(description="One for each input, in the order of the inputs.")
    model: str = Field(description="The name that was asked for.")
    usage: Usage


class ModelObject(BaseModel):
    """A served model. The first four fields are OpenAI's; the rest is null until the model is loaded."""

    model_config = ConfigDict(extra="forbid")

    id: str
    object: Literal["model"]
    created: int = Field(description="Unix time, seconds.")
    owned_by: str
    state: str = Field(
        description="unloaded, downloading, compiling, loading, ready, hung, failed or unloading."
    )
    error: str | None = Field(description="Why it failed, hangs, is loaded anew, or takes long to load.")
    name: str = Field(description="The repository's id or directory.")
    source: str | None = Field(
        description="The hub it came from; before loading, the one that was asked for."
    )
    revision: str | None
    dimensions: int | None = Field(description="Native size of a vector.")
    supported_dimensions: list[int] | Literal["any"] | None = Field(
        description="Smaller sizes it can be cut to."
    )
    max_input_tokens: int | None
    pooling: str | None
    normalize: bool | None
    prompts: list[str] | None = Field(description="Names for `input_type`.")
    precision: str | None
    device: str | None
    backend: str | None
    notes: list[str] | None = Field(description="What to know of how it was loaded.")
    memory_bytes: int | None = Field(
        description="What it takes in memory, reckoned from its weights: in that of its device where it has its own."
    )
    fidelity: FidelityObject | None = Field(
        description="Null where the backend is the reference itself (torch at fp32), where it was not measured "
        "(a note says why), and where the model is not loaded."
    )


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelObject]


class Health(BaseModel):
    status: Literal["ok"]


class ModelReadiness(BaseModel):
    state: str
    error: str | None = Field(
        None, description="Why it failed, hangs, is loaded anew, or takes long to load."
    )
    notes: list[str] | None = Field(
        None, description="What to know of how it was loaded, such as why torch serves it and not OpenVINO."
    )


class Readiness(BaseModel):
    status: Literal["ready", "not_ready"]
    models: dict[str, ModelReadiness]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return FastAPI's description of errors with these statuses."""
    return {status: {"model": ErrorResponse, "description": _MEANINGS[status]} for status in statuses}


_MEANINGS = {
    400: "The request is at fault; `param` and `code` say how.",
    401: "No API key, or a wrong one.",
    403: "Not from here, or not over HTTP; `code` says which.",
    404: "No such model.",
    408: "The client did not send its whole request in time.",
    409: "It is in use, or the name is; the message says by what, and what to do.",
    413: "The body is too large.",
    415: "The body is compressed.",
    429: "The queue is full, or the bodies of all requests are too large together; `Retry-After` says when to try "
    "again.",
    500: "The server failed; quote the request id.",
    502: "The hub could not be asked, or gave something else than it announced.",
    503: "The model is loading, could not be loaded, or the service is stopping.",
    504: "Not answered in time.",
}
