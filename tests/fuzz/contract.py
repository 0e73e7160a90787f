"""The HTTP contract as data, and the check of an answer against it: what no request at all may get from the service."""

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
"""Of the bundled model."""

FIELDS = (
    "model", "input", "encoding_format", "dimensions", "output_dimension", "input_type", "task", "prompt_name",
    "truncate", "truncation", "truncate_prompt_tokens", "normalize", "normalized",
)  # fmt: skip
MANAGEMENT = ("model_name", "source", "revision", "all", "wait_s")
"""Parameters of routes below /api/ that are fuzzed."""
_REQUEST, _RATE = "invalid_request_error", "rate_limit_error"


@dataclass(frozen=True, slots=True)
class Refusal:
    """One line of the contract's table of errors, less the message."""

    type: str = _REQUEST
    params: tuple[str | None, ...] | None = (None,)
    """What `param` may be; None: anything that was sent."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Headers that it must carry, each with a pattern for its value."""


_RETRY_AFTER = {"retry-after": r"[1-9]|[1-9][0-9]|1[01][0-9]|120"}

REFUSALS: dict[tuple[int, str], Refusal] = {
    (400, "invalid_json"): Refusal(),
    (400, "missing_required_parameter"): Refusal(params=("input", "model", "model_name")),
    (400, "invalid_type"): Refusal(params=FIELDS + MANAGEMENT),
    (400, "invalid_value"): Refusal(params=FIELDS + MANAGEMENT),
    (400, "invalid_input"): Refusal(params=("input",)),
    (400, "array_too_long"): Refusal(params=("input",)),
    (400, "context_length_exceeded"): Refusal(params=("input",)),
    (400, "max_tokens_per_request"): Refusal(params=("input",)),
    (400, "invalid_dimensions"): Refusal(params=("dimensions",)),
    (400, "token_input_unsupported"): Refusal(params=("input",)),
    (400, "host_not_allowed"): Refusal(),
    (400, "cors_refused"): Refusal(),
    (400, "invalid_http"): Refusal(headers={"connection": "close"}),
    (401, "invalid_api_key"): Refusal(headers={"www-authenticate": "Bearer"}),
    (403, "admin_only"): Refusal(),
    (404, "model_not_found"): Refusal(params=("model",)),
    (400, "unknown_parameter"): Refusal(params=None),
    (404, "not_cached"): Refusal(),
    (404, "job_not_found"): Refusal(),
    (404, "unknown_url"): Refusal(),
    (405, "method_not_allowed"): Refusal(headers={"allow": r"[A-Z, ]+"}),
    (408, "request_timeout"): Refusal(headers={"connection": "close"}),
    (413, "request_too_large"): Refusal(),
    (415, "unsupported_content_encoding"): Refusal(),
    (431, "headers_too_large"): Refusal(headers={"connection": "close"}),
    (429, "queue_full"): Refusal(type=_RATE, headers=_RETRY_AFTER),
}
"""Status and code of every error that a client can bring about. All others, and every 5xx, are faults of the service."""

_OTHER_TYPES = {"/metrics": "text/plain", "/docs": "text/html"}
_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


@dataclass(frozen=True, slots=True)
class Answer:
    """A response, whoever read it. Header names are in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @classmethod
    def of(cls, response: httpx.Response) -> Answer:
        return cls(
            response.status_code, {k.lower(): v for k, v in response.headers.items()}, response.content
        )

    @property
    def code(self) -> str | None:
        """The error's code; None where it is no error."""
        return None if self.status < 400 else str(json.loads(self.body)["error"]["code"])


def check(answer: Answer, *, path: str = "", has_body: bool = True) -> None:
    """Check what holds for every response of the service, whatever was sent."""
    identifier = answer.headers.get("x-request-id", "")
    assert _SANE_REQUEST_ID.fullmatch(identifier), f"request id {identifier!r}"
    assert answer.status < 500, (answer.status, answer.body[:500])
    if answer.status >= 400:
        assert answer.headers["content-type"] == "application/json"
        if has_body:
            _check_refusal(answer)
    elif answer.status == 200 and not path.startswith("/docs/"):
        kind = next(
            (kind for prefix, kind in _OTHER_TYPES.items() if path.startswith(prefix)), "application/json"
        )
        assert answer.headers["content-type"].startswith(kind)


def _check_refusal(answer: Answer) -> None:
    body = json.loads(answer.body)
    assert set(body) == {"error"}, body
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}, error
    assert (answer.status, error["code"]) in REFUSALS, (answer.status, error)
    allowed = REFUSALS[answer.status, error["code"]]
    assert error["type"] == allowed.type, error
    assert allowed.params is None or error["param"] in allowed.params, error
    for name, pattern in allowed.headers.items():
        assert re.fullmatch(pattern, answer.headers.get(name, "")), (name, answer.headers)
    message = error["message"]
    assert isinstance(message, str)
    assert message
    assert len(message) < 2000, f"a message of {len(message)} characters"
    assert "Traceback" not in message


def vectors(answer: Answer, sent: Mapping[str, Any], *, default_model: str) -> NDArray[np.float32]:
    """Check an answer of 200 against the fields that were sent; return its vectors, float32 of shape (inputs, size)."""
    body = json.loads(answer.body)
    assert list(body) == ["object", "data", "model", "usage"]
    assert body["object"] == "list"
    assert body["model"] == (sent.get("model") or default_model)
    data, expected = body["data"], inputs_in(sent["input"])
    assert len(data) == expected
    assert [entry["index"] for entry in data] == list(range(expected))
    assert all(list(entry) == ["object", "index", "embedding"] for entry in data)
    assert {entry["object"] for entry in data} == {"embedding"}
    encoding = (sent.get("encoding_format") or "float").lower()
    rows = np.array([_vector(entry["embedding"], encoding) for entry in data], dtype=np.float32)
    assert np.isfinite(rows).all()
    size = _first(sent, "dimensions", "output_dimension")
    assert rows.shape == (expected, size or NATIVE_DIMENSION)
    # A smaller size is always brought to length 1.
    if _first(sent, "normalize", "normalized") is not False or size not in {None, NATIVE_DIMENSION}:
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-3)
    usage = body["usage"]
    assert set(usage) == {"prompt_tokens", "total_tokens"}
    assert type(usage["prompt_tokens"]) is int
    assert usage["prompt_tokens"] == usage["total_tokens"] >= expected
    truncated = answer.headers.get("x-truncated-inputs")
    assert truncated is None or 1 <= int(truncated) <= expected
    return rows


def inputs_in(given: Any) -> int:
    """Return how many vectors a valid `input` asks for."""
    return len(given) if isinstance(given, list) and not isinstance(given[0], int) else 1


def _vector(embedding: Any, encoding: str) -> NDArray[np.float32]:
    if encoding == "float":
        assert isinstance(embedding, list)
        assert all(type(number) in {float, int} for number in embedding)
        return np.array(embedding, dtype=np.float32)
    assert isinstance(embedding, str)
    assert len(embedding) % 4 == 0
    return np.frombuffer(base64.b64decode(embedding, validate=True), dtype="<f4")


def _first(fields: Mapping[str, Any], *names: str) -> Any:
    """Return what the first of a field's names says, null being the same as absent."""
    return next((fields[name] for name in names if fields.get(name) is not None), None)
