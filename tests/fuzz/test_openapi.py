"""What schemathesis makes of our own /openapi.json: requests that fit it, and requests that do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from hypothesis import given
from schemathesis import GenerationMode, checks

from tests.fuzz.bodies import PLAIN
from tests.fuzz.contract import Answer, check, vectors
from tests.fuzz.fuzzing import KEY

if TYPE_CHECKING:
    from tests.fuzz.fuzzing import Fuzz

_FITTING, _OTHER = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
OPERATIONS = {
    ("POST", "/v1/embeddings", _FITTING): 0.06,
    ("POST", "/v1/embeddings", _OTHER): 0.1,
    ("GET", "/v1/models", _FITTING): 0.01,
    ("GET", "/v1/models", _OTHER): 0.01,
    ("GET", "/v1/models/{model}", _FITTING): 0.02,
    ("GET", "/v1/models/{model}", _OTHER): 0.02,
    ("GET", "/health", _FITTING): 0.01,
    ("GET", "/ready", _FITTING): 0.01,
    ("GET", "/metrics", _FITTING): 0.01,
    ("GET", "/api/models", _FITTING): 0.01,
    ("GET", "/api/models/jobs", _FITTING): 0.01,
    ("GET", "/api/models/jobs/{job_id}", _FITTING): 0.01,
    ("DELETE", "/api/models/jobs/{job_id}", _FITTING): 0.01,
    ("GET", "/api/models/cache/list", _FITTING): 0.01,
    ("GET", "/api/models/cache/list", _OTHER): 0.01,
    ("GET", "/api/models/cache/{model_id}", _FITTING): 0.02,
    ("GET", "/api/models/cache/{model_id}", _OTHER): 0.02,
    ("POST", "/api/models/cache/{model_id}/verify", _FITTING): 0.01,
}
"""Each with its share of all requests that are generated. What asks for nothing cannot be asked for wrongly."""
NOT_FUZZED = {
    ("POST", "/api/models/load"),
    ("POST", "/api/models/unload"),
    ("POST", "/api/models/download"),
    ("DELETE", "/api/models/cache/{model_id}"),
    ("DELETE", "/api/models/cache/all"),
    ("GET", "/api/models/jobs/{job_id}/events"),
}
"""They would ask a hub, or take away what the others are tested with; and a stream has no end that a test could wait for."""
_CHECKS = [
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
"""Beside our own: nothing is answered but what /openapi.json says."""


@pytest.fixture(scope="module")
def schema(fuzz: Fuzz) -> schemathesis.BaseSchema:
    """Return our own description of the API, as the service gives it."""
    return schemathesis.openapi.from_dict(fuzz.service.http.get("/openapi.json").json())


def test_every_operation_is_fuzzed(schema: Any) -> None:
    """No route is added to the API without being added here, or being left out on purpose."""
    described = {(result.ok().method.upper(), result.ok().path) for result in schema.get_all_operations()}
    assert described == {(method, path) for method, path, _ in OPERATIONS} | NOT_FUZZED


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: f"{each[0]} {each[1]} {each[2].value}")
def test_requests_by_the_description(
    fuzz: Fuzz, schema: Any, operation: tuple[str, str, GenerationMode]
) -> None:
    """Whether a request fits the description or not, its answer does."""
    method, path, mode = operation

    @fuzz.settings(OPERATIONS[operation])
    @given(schema[path][method].as_strategy(generation_mode=mode))
    def as_described(case: schemathesis.Case[Any]) -> None:
        response = case.call(base_url=fuzz.service.url, headers={"authorization": f"Bearer {KEY}"})
        headers = {name.lower(): values[0] for name, values in response.headers.items()}
        answer = Answer(response.status_code, headers, response.content)
        fuzz.note(f"{method} {path}", answer)
        check(answer, path=path, has_body=case.method != "HEAD")
        if answer.status == 200 and isinstance(case.body, dict):
            vectors(answer, case.body, default_model=PLAIN)
        case.validate_response(response, checks=_CHECKS)

    as_described()
    fuzz.assert_alive()
