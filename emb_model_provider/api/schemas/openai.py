"""Requests and responses of OpenAI's API, with the fields that this service adds.

They describe the API. Requests for embeddings are parsed in `routes/embeddings.py`, which is faster.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from emb_model_provider.management.types import FidelityObject

TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
TextObject = Annotated[dict[Literal["text"], str], Field(min_length=1)]

_ERROR_DESCRIPTIONS = {
    400: "The request is invalid; `param` and `code` say why.",
    401: "The API key is missing or wrong.",
    403: "The caller or the operation is not allowed; `code` says which.",
    404: "Not found.",
    408: "The client did not send the whole request in time.",
    409: "What is changed is in use; the message says by what, and what to do.",
    413: "The request body is too large.",
    415: "The request body is compressed in an unsupported way.",
    429: "The queue is full, or all current request bodies are too large in total; `Retry-After` says when to try again.",
    500: "The server failed; its log has the reason under the request id.",
    502: "The hub did not respond, or its files differ from what it announced.",
    503: "The model is loading, could not be loaded, or the service is shutting down.",
    504: "The request was not answered in time.",
    507: "The disk of the files has not enough space.",
}


def error_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the `responses` of a route that can fail with these statuses."""
    return {status: {"model": ErrorResponse, "description": _ERROR_DESCRIPTIONS[status]} for status in statuses}


def request_body(model: type[BaseModel]) -> dict[str, Any]:
    """Return the `openapi_extra` of a route that parses its request body itself. `app.py` adds the schema."""
    schema = {"$ref": f"#/components/schemas/{model.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


class EmbeddingRequest(BaseModel):
    """A request for embeddings. Unknown fields are ignored; null is the same as absent."""

    model_config = ConfigDict(
        use_attribute_docstrings=True,
        json_schema_extra={
            "examples": [{"model": "sentence-transformers/all-MiniLM-L6-v2", "input": ["hello", "你好"]}]
        },
    )

    input: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=2048)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, max_length=2048)]
        | Annotated[list[TextObject], Field(min_length=1, max_length=2048)]
    )
    """One text, or up to 2048, also in the form `{"text": "..."}`. Token ids are those of OpenAI's tokenizer cl100k, unless the model's `token_input` says otherwise."""
    model: str | None = None
    """An alias, a model's id, or the unique last part of an id. Default: the default model."""
    embedding_types: Annotated[list[Literal["dense", "sparse", "multi_vector"]], Field(min_length=1)] | None = None
    """What is returned of each input: `embedding`, `sparse`, `multi_vector`. Default: dense. The model must have it: see its
    `tasks`."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Number of the largest weights of a sparse vector that are returned. Default: all."""
    encoding_format: Literal["float", "base64"] | None = "float"
    """`base64` is padded standard base64 of the little-endian values, by default float32."""
    output_dtype: Literal["float", "float16", "int8", "uint8", "binary", "ubinary"] | None = "float"
    """Type of the values. `int8` and `uint8` are scaled by a range of the model; `binary` and `ubinary` are the signs, eight
    in each byte. Also `embedding_type`, `embedding_types` (an array), `encoding_dtype` and `embed_dtype`. Only dense vectors have
    other types than float32."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Truncate vectors to this size and normalize them again, if the model was trained for it (Matryoshka) or the
    operator allows it. Also `output_dimension`."""
    input_type: str | None = None
    """Selects one of the model's prompts, and the part of an asymmetric model that embeds the input: query, document, a synonym (search_query, retrieval.query, passage,
    search_document, retrieval.passage), or the name of a prompt. Also `task` and `prompt_name`."""
    instruction: str | None = None
    """Replaces the instruction in the prompt of the model, if its prompts contain one (as those of Qwen3-Embedding do);
    else it is put before each input as it is."""
    truncate: bool | Literal["NONE", "START", "END"] | None = None
    """At which end an input that is too long is truncated; NONE or false rejects it instead. Default: the
    end that the tokenizer of the model declares, which is nearly always END, unless the operator has set another value for
    the model. The response header `x-truncated-inputs` has the number of truncated
    inputs. Also `truncation`."""
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    """Truncate inputs to this many tokens; -1 is the model's own limit."""
    truncation_side: Literal["left", "right"] | None = None
    """At which end an input that is too long is truncated: left is START of `truncate`, right is END."""
    normalize: bool | None = None
    """Whether vectors are normalized to length 1. Default: as the model does. Also `normalized`."""
    user: str | None = None
    """Accepted and not used."""


class SparseEmbedding(BaseModel):
    """A sparse vector."""

    indices: list[int] = Field(description="Token ids with a weight, ascending.")
    values: list[float] = Field(description="Their weights.")


class EmbeddingObject(BaseModel):
    """The vectors of one input."""

    object: Literal["embedding"]
    index: int = Field(description="Position of the input in the request.")
    embedding: list[float] | str = Field(
        description="Numbers, or base64 if the request asks for it. Empty if the request excludes the dense vector."
    )
    sparse: SparseEmbedding | None = Field(None, description="Only if the request asks for it.")
    multi_vector: list[list[float]] | str | None = Field(
        None, description="The vectors of the tokens, only if the request asks for them: numbers, or base64 of float32."
    )
    shape: list[int] | None = Field(None, description="Number and size of the vectors in `multi_vector`, with base64.")


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int = Field(description="Tokens that were processed, after truncation.")
    total_tokens: int


class EmbeddingResponse(BaseModel):
    """The vectors of all inputs of a request."""

    object: Literal["list"]
    data: list[EmbeddingObject] = Field(description="One for each input, in the order of the inputs.")
    model: str = Field(description="The name that the request used.")
    usage: Usage


class OutputTypes(BaseModel):
    """Vectors of integers and bits: how they are scaled, and what they cost."""

    int8_range: float = Field(
        description="The absolute value that becomes 127 of int8 and 255 of uint8, unless a request sets `normalize` or "
        "`dimensions`."
    )
    int8_range_normalized: float = Field(
        description="The same for vectors of length 1. For vectors of size d, multiply by the square root of dimensions/d."
    )
    top10_overlap: dict[str, float] = Field(
        description="By type: share of each text's ten nearest neighbors that are the same as among float vectors, 0 to 1."
    )


class TuningObject(BaseModel):
    """Options of OpenVINO that are chosen by measurement."""

    fused_attention: bool = Field(description="Whether one kernel computes the attention of batches.")
    fused_attention_alone: bool = Field(description="The same for a request that is alone.")
    streams: int | None = Field(description="Batches that run at the same time. Null: one per processor, up to four.")
    activation_group: int | None = Field(
        description="Values of an activation that share a scale, if activations are quantized to 8 bits; else null."
    )
    int8_gain: float | None = Field(
        description="How many times as fast the model is with activations in 8 bits as without, on this processor. Null: they "
        "are not quantized, or it was not measured."
    )


class ModelObject(BaseModel):
    """A served model. The first four fields are OpenAI's. What only loading determines is null until then."""

    model_config = ConfigDict(extra="forbid")

    id: str
    object: Literal["model"]
    created: int = Field(description="Unix time in seconds.")
    owned_by: str
    state: str = Field(description="unloaded, downloading, compiling, loading, ready, hung, failed or unloading.")
    error: str | None = Field(description="Why it failed, hangs, is being reloaded, or takes long to load.")
    name: str = Field(description="The repository's id or directory.")
    source: str | None = Field(description="The hub it came from; before it is loaded, the requested hub.")
    revision: str | None
    kind: str | None = Field(
        description="What the model computes: dense, reranker, classifier, sparse, multi-vector or bge-m3."
    )
    tasks: list[str] | None = Field(
        description="What requests can ask it for: embed, rerank, classify, embed_sparse, embed_multi_vector."
    )
    labels: list[str] | None = Field(
        description="Labels of a classifier, in the order of `probs`. null for other models."
    )
    dimensions: int | None = Field(
        description="Native size of a vector, or of the vector of a token. null for models that return scores only."
    )
    supported_dimensions: list[int] | Literal["any"] | None = Field(
        description="Smaller sizes that vectors can be truncated to."
    )
    max_input_tokens: int | None
    input_type: str | None = Field(
        description="The `input_type` of requests that use this alias and have none themselves."
    )
    model_type: Literal["embedding", "rerank"] = Field(description="For clients of Xinference.")
    model_name: str = Field(description="The same as `name`, for clients of Xinference.")
    max_tokens: int | None = Field(description="The same as `max_input_tokens`, for clients of Xinference.")
    pooling: str | None
    normalize: bool | None
    prompts: list[str] | None = Field(
        description="Names for `input_type`: those of prompts, and of the routes of an asymmetric model."
    )
    precision: str | None
    device: str | None
    backend: str | None
    notes: list[str] | None = Field(description="Notes on how it was loaded.")
    tuning: TuningObject | None = Field(
        description="The options of OpenVINO that were the fastest on this processor when the model was compiled, or since "
        "`emb-provider tune`. Null for other backends, and if the model is not loaded."
    )
    memory_bytes: int | None = Field(
        description="Memory that it takes, estimated from its weights; on a device with separate memory, memory of the "
        "device."
    )
    fidelity: FidelityObject | None = Field(
        description="Null if the backend is the reference itself (torch at fp32), if it was not measured (a note says "
        "why), and if the model is not loaded."
    )
    output_types: OutputTypes | None = Field(
        description="Null if it was not measured, and if the model is not loaded. Without it, int8 and uint8 are not "
        "available."
    )


class ModelList(BaseModel):
    """The served models."""

    object: Literal["list"]
    data: list[ModelObject]


class About(BaseModel):
    """What this service is, with the paths of its documentation and of its main routes."""

    name: str
    version: str
    description: str
    base_url: str = Field(description="The path of the base URL for clients of OpenAI.")
    default_model: str = Field(description="Alias of the model that serves requests without a model name.")
    documentation: str
    models: str
    state: str
    console: str | None = Field(description="The web console; null if EMB_PROVIDER_CONSOLE=false.")


class Health(BaseModel):
    """The process responds."""

    status: Literal["ok"]


class ModelReadiness(BaseModel):
    """The state of a served model."""

    state: str
    required: bool | None = Field(
        None, description="false for a model that is loaded at startup and that the service can do without."
    )
    error: str | None = Field(None, description="Why it failed, hangs, is being reloaded, or takes long to load.")
    progress: str | None = Field(
        None, description="How far its download or its compilation has come: `step 3 of 6 (export), about 20 s left`."
    )
    notes: list[str] | None = Field(
        None, description="Notes on how it was loaded, for example why it runs on torch instead of OpenVINO."
    )


class Readiness(BaseModel):
    """Whether all required models can answer."""

    status: Literal["ready", "not_ready"]
    models: dict[str, ModelReadiness]


class ErrorDetail(BaseModel):
    """An error in OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every error."""

    error: ErrorDetail
