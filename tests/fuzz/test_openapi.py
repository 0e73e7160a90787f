"""Requests that schemathesis generates from `/openapi.json`, valid and invalid."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import schemathesis
from hypothesis import given
from hypothesis import strategies as st
from schemathesis import GenerationMode, checks

from tests.fuzz.bodies import CLASSIFIER, PLAIN, RERANKER
from tests.fuzz.contract import Response, check, check_scores, vectors
from tests.fuzz.fuzzing import KEY, fuzz_test

if TYPE_CHECKING:
    from tests.fuzz.fuzzing import Fuzz

_VALID, _INVALID = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
OPERATIONS = {
    ("POST", "/v1/embeddings", _VALID): 0.06,
    ("POST", "/v1/embeddings", _INVALID): 0.1,
    ("POST", "/v1/rerank", _VALID): 0.05,
    ("POST", "/v1/rerank", _INVALID): 0.05,
    ("POST", "/v1/score", _VALID): 0.02,
    ("POST", "/v1/score", _INVALID): 0.02,
    ("POST", "/v1/classify", _VALID): 0.02,
    ("POST", "/v1/classify", _INVALID): 0.02,
    ("POST", "/v1/similarity", _VALID): 0.02,
    ("POST", "/v1/similarity", _INVALID): 0.02,
    ("GET", "/v1/models", _VALID): 0.01,
    ("GET", "/v1/models", _INVALID): 0.01,
    ("GET", "/v1/models/{model}", _VALID): 0.02,
    ("GET", "/v1/models/{model}", _INVALID): 0.02,
    ("POST", "/v1/files", _VALID): 0.01,
    ("POST", "/v1/files", _INVALID): 0.02,
    ("GET", "/v1/files", _VALID): 0.01,
    ("GET", "/v1/files", _INVALID): 0.02,
    ("GET", "/v1/files/{file_id}", _VALID): 0.01,
    ("DELETE", "/v1/files/{file_id}", _VALID): 0.01,
    ("GET", "/v1/files/{file_id}/content", _VALID): 0.01,
    ("POST", "/v1/batches", _VALID): 0.02,
    ("POST", "/v1/batches", _INVALID): 0.02,
    ("GET", "/v1/batches", _VALID): 0.01,
    ("GET", "/v1/batches", _INVALID): 0.01,
    ("GET", "/v1/batches/{batch_id}", _VALID): 0.01,
    ("POST", "/v1/batches/{batch_id}/cancel", _VALID): 0.01,
    ("GET", "/", _VALID): 0.01,
    ("GET", "/health", _VALID): 0.01,
    ("GET", "/ready", _VALID): 0.01,
    ("GET", "/metrics", _VALID): 0.01,
    ("GET", "/api/models", _VALID): 0.01,
    ("GET", "/api/models/jobs", _VALID): 0.01,
    ("GET", "/api/models/jobs/{job_id}", _VALID): 0.01,
    ("DELETE", "/api/models/jobs/{job_id}", _VALID): 0.01,
    ("GET", "/api/models/cache/list", _VALID): 0.01,
    ("GET", "/api/models/cache/list", _INVALID): 0.01,
    ("GET", "/api/models/cache/{model_id}", _VALID): 0.02,
    ("GET", "/api/models/cache/{model_id}", _INVALID): 0.02,
    ("POST", "/api/models/cache/{model_id}/verify", _VALID): 0.01,
}
"""Operations with their share of all examples. Operations without parameters have no invalid requests."""
MODELS = {"/v1/rerank": RERANKER, "/v1/score": RERANKER, "/v1/classify": CLASSIFIER, "/v1/similarity": PLAIN}
NOT_FUZZED = {
    ("POST", "/api/models/load"),
    ("POST", "/api/models/unload"),
    ("POST", "/api/models/download"),
    ("POST", "/api/models/transfer"),
    ("DELETE", "/api/models/cache/{model_id}"),
    ("DELETE", "/api/models/cache/all"),
    ("GET", "/api/models/jobs/{job_id}/events"),
}
"""Operations that send requests to a hub, change the served models, or return an endless stream."""
_CHECKS = [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance]
"""Responses must match `/openapi.json`, besides the checks of `contract.py`."""


@pytest.fixture(scope="module")
def schema(fuzz: Fuzz) -> schemathesis.BaseSchema:
    """Return the OpenAPI document of the service."""
    return schemathesis.openapi.from_dict(fuzz.service.http.get("/openapi.json").json())


def test_every_operation_is_fuzzed(schema: Any) -> None:
    """Each route of the API is in one of the two tables."""
    described = {(result.ok().method.upper(), result.ok().path) for result in schema.get_all_operations()}
    assert described == {(method, path) for method, path, _ in OPERATIONS} | NOT_FUZZED


@fuzz_test
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda each: f"{each[0]} {each[1]} {each[2].value}")
def test_responses_match_the_document(
    fuzz: Fuzz, schema: Any, operation: tuple[str, str, GenerationMode], scale: int
) -> None:
    """The responses to valid and invalid requests match the document."""
    method, path, mode = operation

    @fuzz.settings(OPERATIONS[operation] * scale)
    @given(schema[path][method].as_strategy(generation_mode=mode), st.booleans())
    def check_case(case: schemathesis.Case[Any], names_model: bool) -> None:
        if names_model and path in MODELS and isinstance(case.body, dict):
            case.body["model"] = MODELS[path]  # random names are unknown
        received = case.call(base_url=fuzz.service.url, headers={"authorization": f"Bearer {KEY}"})
        headers = {name.lower(): values[0] for name, values in received.headers.items()}
        response = Response(received.status_code, headers, received.content)
        fuzz.count(f"{method} {path}", response)
        check(response, path=path, has_body=case.method != "HEAD")
        if response.status == 200 and path == "/v1/embeddings":
            vectors(response, case.body, default_model=PLAIN)
        elif response.status == 200 and path in MODELS and isinstance(case.body, dict):
            check_scores(json.loads(response.body), case.body)
        case.validate_response(received, checks=_CHECKS)

    check_case()
    fuzz.assert_alive()
