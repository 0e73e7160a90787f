"""The HTTP contract as data, and checks of responses against it."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    import httpx
    from numpy.typing import NDArray

NATIVE_DIMENSION = 384
"""Native size of a vector of the bundled model."""

FIELDS = (
    "model", "input", "encoding_format", "dimensions", "output_dimension", "input_type", "task", "prompt_name", "instruction",
    "truncate", "truncation", "truncate_prompt_tokens", "normalize", "normalized", "truncation_side", "truncation_direction",
    "output_dtype", "embedding_type", "embedding_types", "encoding_dtype", "embed_dtype", "truncate_dim",
    "output_dimensionality", "text_type", "instruct", "top_k", "return_dense", "return_sparse", "return_colbert_vecs",
)  # fmt: skip
SCORES = (
    "query", "documents", "texts", "text_1", "text_2", "inputs", "parameters", "top_n", "return_documents", "raw_scores",
    "use_activation", "max_tokens_per_doc",
)  # fmt: skip
"""Fields of the requests for scores that those for embeddings do not have."""
TEXTS = ("input", "documents", "texts", "text_1", "text_2", "query")
MANAGEMENT = ("model_name", "source", "revision", "all", "wait_s")
"""Query parameters of the fuzzed routes below /api/."""
BATCHES = (
    "file", "purpose", "expires_after[anchor]", "expires_after[seconds]", "limit", "order", "after", "input_file_id", "endpoint",
    "completion_window", "metadata", "output_expires_after", "output_expires_after.seconds",
)  # fmt: skip
"""Fields and query parameters of /v1/files and /v1/batches."""
_REQUEST, _RATE = "invalid_request_error", "rate_limit_error"


@dataclass(frozen=True, slots=True)
class ErrorForm:
    """What the contract says about an error, except its message."""

    type: str = _REQUEST
    params: tuple[str | None, ...] | None = (None,)
    """Allowed values of `param`; None: any."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Required headers, with a pattern for each value."""


_RETRY_AFTER = {"retry-after": r"[1-9]|[1-9][0-9]|1[01][0-9]|120"}

ERRORS: dict[tuple[int, str], ErrorForm] = {
    (400, "invalid_json"): ErrorForm(),
    (400, "missing_required_parameter"): ErrorForm(params=("model", "model_name", "inputs", *TEXTS, *BATCHES)),
    (400, "invalid_type"): ErrorForm(params=FIELDS + SCORES + MANAGEMENT + BATCHES),
    (400, "invalid_value"): ErrorForm(params=FIELDS + SCORES + MANAGEMENT + BATCHES),
    (400, "invalid_content_type"): ErrorForm(params=("file",)),
    (400, "invalid_form"): ErrorForm(params=(None, "file")),
    (404, "file_not_found"): ErrorForm(params=("id", "after", "input_file_id")),
    (404, "batch_not_found"): ErrorForm(params=("id",)),
    (409, "state_conflict"): ErrorForm(params=("id",)),
    (400, "invalid_input"): ErrorForm(params=TEXTS),
    (400, "array_too_long"): ErrorForm(params=TEXTS),
    (400, "context_length_exceeded"): ErrorForm(params=TEXTS),
    (400, "max_tokens_per_request"): ErrorForm(params=TEXTS),
    (400, "invalid_dimensions"): ErrorForm(params=("dimensions",)),
    (400, "unsupported_task"): ErrorForm(params=("model",)),
    (400, "token_input_unsupported"): ErrorForm(params=("input",)),
    (400, "host_not_allowed"): ErrorForm(),
    (400, "cors_refused"): ErrorForm(),
    (400, "invalid_http"): ErrorForm(headers={"connection": "close"}),
    (401, "invalid_api_key"): ErrorForm(headers={"www-authenticate": "Bearer"}),
    (403, "admin_only"): ErrorForm(),
    (403, "cors_refused"): ErrorForm(),
    (404, "model_not_found"): ErrorForm(params=("model",)),
    (400, "unknown_parameter"): ErrorForm(params=None),
    (404, "not_cached"): ErrorForm(),
    (404, "job_not_found"): ErrorForm(),
    (404, "unknown_url"): ErrorForm(),
    (405, "method_not_allowed"): ErrorForm(headers={"allow": r"[A-Z, ]+"}),
    (408, "request_timeout"): ErrorForm(headers={"connection": "close"}),
    (413, "request_too_large"): ErrorForm(),
    (415, "unsupported_content_encoding"): ErrorForm(),
    (431, "headers_too_large"): ErrorForm(headers={"connection": "close"}),
    (429, "queue_full"): ErrorForm(type=_RATE, headers=_RETRY_AFTER),
}
"""All errors that a client can cause, by status and code. Every other error is a defect of the service."""

_DIALECTS = ({"error"}, {"error", "error_type"}, {"message"})
"""Fields of the errors of Ollama, TEI and Cohere, on their routes, which arbitrary bytes can hit."""
_OTHER_TYPES = {"/metrics": "text/plain", "/docs": "text/html"}
_VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


@dataclass(frozen=True, slots=True)
class Response:
    """A response, from an HTTP client or from a raw connection. The names of headers are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @classmethod
    def of(cls, response: httpx.Response) -> Response:
        return cls(response.status_code, {k.lower(): v for k, v in response.headers.items()}, response.content)

    @property
    def code(self) -> str | None:
        """The code of an error; None for other responses."""
        if self.status < 400:
            return None
        error = json.loads(self.body).get("error")
        return str(error["code"]) if isinstance(error, dict) else None


def check(response: Response, *, path: str = "", has_body: bool = True) -> None:
    """Check what must hold for every response of the service, whatever was sent."""
    identifier = response.headers.get("x-request-id", "")
    assert _VALID_REQUEST_ID.fullmatch(identifier), f"request id {identifier!r}"
    assert response.status < 500, (response.status, response.body[:500])
    if response.status >= 400:
        assert response.headers["content-type"] == "application/json"
        if has_body:
            _check_error(response, any_dialect=not path)
    elif response.status == 200 and not path.startswith("/docs/"):
        kind = next((kind for prefix, kind in _OTHER_TYPES.items() if path.startswith(prefix)), "application/json")
        assert response.headers["content-type"].startswith(kind)


def _check_error(response: Response, *, any_dialect: bool) -> None:
    body = json.loads(response.body)
    if any_dialect and set(body) in _DIALECTS and all(isinstance(value, str) for value in body.values()):
        assert response.status in {status for status, _ in ERRORS}, body
        return
    assert set(body) == {"error"}, body
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert (response.status, error["code"]) in ERRORS, (response.status, error)
    allowed = ERRORS[response.status, error["code"]]
    assert error["type"] == allowed.type, error
    assert allowed.params is None or error["param"] in allowed.params, error
    for name, pattern in allowed.headers.items():
        assert re.fullmatch(pattern, response.headers.get(name, "")), (name, response.headers)
    message = error["message"]
    assert isinstance(message, str)
    assert message
    assert len(message) < 2000, f"a message of {len(message)} characters"
    assert "Traceback" not in message


def vectors(response: Response, sent: Mapping[str, Any], *, default_model: str) -> NDArray[np.float32]:
    """Check a response with status 200 against the fields that were sent.

    Returns:
        Its vectors, float32 of shape (inputs, dimensions).
    """
    body = json.loads(response.body)
    assert list(body) == ["object", "data", "model", "usage"]
    assert body["object"] == "list"
    assert body["model"] == (sent.get("model") or default_model)
    data, expected = body["data"], count_inputs(sent["input"])
    assert len(data) == expected
    assert [entry["index"] for entry in data] == list(range(expected))
    assert all(list(entry) == ["object", "index", "embedding"] for entry in data)
    assert {entry["object"] for entry in data} == {"embedding"}
    encoding = (sent.get("encoding_format") or "float").lower()
    kind = _kind(sent)
    rows = np.array([_vector(entry["embedding"], encoding, kind) for entry in data], dtype=np.float32)
    assert np.isfinite(rows).all()
    size = _first(sent, "dimensions", "output_dimension")
    values = size or NATIVE_DIMENSION
    assert rows.shape == (expected, -(-values // 8) if "binary" in kind else values)
    # Vectors of a smaller size are always normalized, but integers are not of length 1.
    if kind.startswith("float") and (
        _first(sent, "normalize", "normalized") is not False or size not in {None, NATIVE_DIMENSION}
    ):
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3)
    usage = body["usage"]
    assert set(usage) == {"prompt_tokens", "total_tokens"}
    assert type(usage["prompt_tokens"]) is int
    assert usage["prompt_tokens"] == usage["total_tokens"] >= expected
    truncated = response.headers.get("x-truncated-inputs")
    assert truncated is None or 1 <= int(truncated) <= expected
    return rows


def check_scores(body: Any, sent: Mapping[str, Any]) -> None:
    """Check the body of a response of `/v1/rerank`, `/v1/score`, `/v1/classify` or `/v1/similarity` against its request."""
    if "documents" in sent or "texts" in sent:
        documents = sent["documents"] if sent.get("documents") is not None else sent["texts"]
        results = body["results"] if isinstance(body, dict) else body
        scores = [each["relevance_score" if isinstance(body, dict) else "score"] for each in results]
        assert scores == sorted(scores, reverse=True)
        count = len(documents) if isinstance(documents, list) else 1
        indexes = [each["index"] for each in results]
        assert len(set(indexes)) == len(indexes) == min(count, _first(sent, "top_n", "top_k") or count)
        assert set(indexes) <= set(range(count))
    elif "inputs" in sent:
        scores = body
        assert len(scores) == len(sent["inputs"]["sentences"])
    else:
        texts = _first(sent, "text_2", "input")
        assert [each["index"] for each in body["data"]] == list(range(len(texts) if isinstance(texts, list) else 1))
        scores = [value for each in body["data"] for value in each.get("probs", [each.get("score")])]
    assert np.isfinite(np.array(scores, dtype=np.float64)).all()


def count_inputs(value: Any) -> int:
    """Return the number of vectors for a valid `input`."""
    return len(value) if isinstance(value, list) and not isinstance(value[0], int) else 1


_DTYPES = {"float16": "<f2", "int8": "i1", "uint8": "u1", "binary": "i1", "ubinary": "u1"}


def _vector(embedding: Any, encoding: str, kind: str) -> NDArray[np.float32]:
    if encoding == "float":
        assert isinstance(embedding, list)
        assert all(type(number) in {float, int} for number in embedding)
        return np.array(embedding, dtype=np.float32)
    assert isinstance(embedding, str)
    assert len(embedding) % 4 == 0
    decoded = np.frombuffer(base64.b64decode(embedding, validate=True), dtype=_DTYPES.get(kind, "<f4"))
    return decoded.astype(np.float32)


def _kind(sent: Mapping[str, Any]) -> str:
    """Return the requested type of values."""
    value = _first(sent, "output_dtype", "embedding_type", "embedding_types", "encoding_dtype", "embed_dtype")
    names = [str(name).lower() for name in (value if isinstance(value, list) else [value])]
    return next((name for name in names if name in _DTYPES), "float")


def _first(fields: Mapping[str, Any], *names: str) -> Any:
    """Return the value of the first of a field's names that is present and not null."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)
