"""Requests and responses of the routes that return scores. The routes parse the requests themselves."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from emb_model_provider.api.schemas.openai import EmbeddingRequest, TextObject, Usage

Texts = Annotated[list[str], Field(min_length=1, max_length=2048)]
TextObjects = Annotated[list[TextObject], Field(min_length=1, max_length=2048)]
Flag = bool | Literal["true", "false"]


class RerankRequest(BaseModel):
    """A request for the scores of documents. Unknown fields are ignored; null is the same as absent."""

    model_config = ConfigDict(
        use_attribute_docstrings=True,
        json_schema_extra={
            "examples": [
                {
                    "model": "BAAI/bge-reranker-v2-m3",
                    "query": "How do I reset my password?",
                    "documents": ["Open the settings and choose Reset.", "The weather is nice today."],
                }
            ]
        },
    )

    query: str
    """What is searched for."""
    documents: Texts | TextObjects | None = None
    """Up to 2048 texts, also in the form `{"text": "..."}`. Either this or `texts` is required."""
    texts: Texts | TextObjects | None = None
    """The documents in TEI's API: the response is an array of `index`, `score` and, if `return_text` is set, `text`."""
    model: str | None = None
    """An alias, a model's id, or the unique last part of an id. Default: the default model."""
    top_n: Annotated[int, Field(ge=1)] | None = None
    """Number of documents that are returned, the best ones. Default: all. Also `top_k`."""
    return_documents: Flag | None = False
    """Whether the response has the documents, too. Also `return_text`."""
    raw_scores: Flag | None = None
    """Whether scores are logits, without the activation of the model. Default: as the alias says, or else false."""
    max_tokens_per_doc: Annotated[int, Field(ge=1)] | None = None
    """Longest document in tokens; what is beyond it is not read."""
    truncate: bool | Literal["true", "false", "NONE", "END"] | None = None
    """What happens to a document that does not fit next to the query. true: as the alias or the model says; by default its
    score is that of the best one of overlapping windows. END: it is cut. NONE or false: the request is rejected. Also
    `truncation`."""
    instruction: str | None = None
    """What is searched for, if the model has instructions; else it is put before the query. Also `instruct`."""


class RerankDocument(BaseModel):
    """A document of the request."""

    text: str


class RerankResult(BaseModel):
    """The score of a document."""

    index: int = Field(description="Position of the document in the request.")
    relevance_score: float = Field(description="0 to 1 for most models; any number with `raw_scores`.")
    document: RerankDocument | str | None = Field(
        None, description="Only if the request asks for it: in `results` an object with `text`, in `data` the text."
    )


class RerankTokens(BaseModel):
    """The tokens of a request, for clients of Cohere."""

    input_tokens: int
    output_tokens: int


class RerankMeta(BaseModel):
    """The use of the service, for clients of Cohere."""

    tokens: RerankTokens
    billed_units: dict[str, int]


class RerankResponse(BaseModel):
    """The scores of the documents of a request."""

    id: str
    object: Literal["list"]
    model: str = Field(description="The name that the request used.")
    results: list[RerankResult] = Field(description="The best document first.")
    data: list[RerankResult] = Field(description="The same, for clients of Voyage.")
    usage: Usage
    meta: RerankMeta
    tokens: RerankTokens


class TeiResult(BaseModel):
    """The score of a document, in the form of TEI."""

    index: int
    score: float
    text: str | None = None


class ScoreRequest(BaseModel):
    """A request for the scores of pairs, as vLLM has it. Unknown fields are ignored; null is the same as absent."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    text_1: str | Texts
    """The first text of each pair, such as a query; or one text for all pairs."""
    text_2: str | Texts
    """The second text of each pair, such as a document."""
    model: str | None = None
    """An alias, a model's id, or the unique last part of an id. Default: the default model."""
    raw_scores: Flag | None = None
    """Whether scores are logits, without the activation of the model. Default: as the alias says, or else false. The field
    `use_activation` has the opposite meaning."""
    truncate: bool | Literal["true", "false", "NONE", "END"] | None = None
    """What happens to a second text that does not fit next to the first one; see `POST /v1/rerank`."""
    instruction: str | None = None
    """What is searched for, if the model has instructions; else it is put before the first text."""


class ScoreObject(BaseModel):
    """The score of a pair."""

    index: int = Field(description="Position of the pair in the request.")
    object: Literal["score"]
    score: float


class ScoreResponse(BaseModel):
    """The scores of all pairs of a request."""

    id: str
    object: Literal["list"]
    created: int = Field(description="Unix time in seconds.")
    model: str = Field(description="The name that the request used.")
    data: list[ScoreObject] = Field(description="One for each pair, in the order of the request.")
    usage: Usage


class ClassifyRequest(BaseModel):
    """A request for the labels of texts, as vLLM has it. Unknown fields are ignored; null is the same as absent."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    input: str | Texts
    """One text, or up to 2048."""
    model: str | None = None
    """An alias, a model's id, or the unique last part of an id. Default: the default model."""
    raw_scores: Flag | None = None
    """Whether scores are logits, without the activation of the model. Default: as the alias says, or else false. The field
    `use_activation` has the opposite meaning."""
    truncate: bool | Literal["true", "false", "NONE", "END"] | None = None
    """NONE or false rejects texts that are too long; else they are cut."""


class ClassifyObject(BaseModel):
    """The scores of a text."""

    index: int = Field(description="Position of the text in the request.")
    label: str = Field(description="The label with the highest score.")
    probs: list[float] = Field(description="The scores of all labels, in the order of `labels` of the model.")
    num_classes: int


class ClassifyResponse(BaseModel):
    """The scores of all texts of a request."""

    id: str
    object: Literal["list"]
    created: int = Field(description="Unix time in seconds.")
    model: str = Field(description="The name that the request used.")
    data: list[ClassifyObject] = Field(description="One for each text, in the order of the request.")
    usage: Usage


class SimilarityInputs(BaseModel):
    """A text, and those that it is compared with."""

    source_sentence: str
    sentences: Annotated[list[str], Field(min_length=1, max_length=2047)]


class SimilarityRequest(BaseModel):
    """A request for similarities, as TEI has it. Unknown fields are ignored; null is the same as absent."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    inputs: Annotated[SimilarityInputs, Field(description="A text, and up to 2047 others.")]
    model: str | None = None
    """An alias, a model's id, or the unique last part of an id. Default: the default model."""
    parameters: dict[str, bool | str | None] | None = None
    """`truncate`, `truncation_direction` and `prompt_name`, as in TEI's API."""


REQUESTS: tuple[type[BaseModel], ...] = (
    EmbeddingRequest,
    RerankRequest,
    ScoreRequest,
    ClassifyRequest,
    SimilarityRequest,
)
"""Requests that routes parse themselves, whose schemas FastAPI does not know."""
