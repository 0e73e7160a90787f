"""`/docs` needs nothing from the network, and `/openapi.json` describes what the service accepts and returns."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

import jsonschema
import pytest
from jsonschema import Draft202012Validator

from tests.api.helpers import KEYS, POISON
from tests.api.openapi_outline import PATH, create_document, outline
from tests.service import BUNDLED

if TYPE_CHECKING:
    import httpx

    from tests.service import Service

VALID_REQUESTS: list[dict[str, Any]] = [
    {"input": "hello"},
    {"model": BUNDLED, "input": ["a", "b"], "encoding_format": "base64", "user": "me"},
    {"model": None, "input": "", "dimensions": None, "normalize": None, "encoding_format": None},
    {"input": ["x"], "dimensions": 384, "input_type": "query", "truncate": "START", "truncate_prompt_tokens": 5},
    {"input": "x", "truncate": True, "normalize": False, "anything": {"else": 1}},
]
INVALID_REQUESTS: list[tuple[dict[str, Any], int]] = [
    ({}, 400),
    ({"input": []}, 400),
    ({"input": ["a", 1]}, 400),
    ({"input": ["x"] * 2049}, 400),
    ({"input": "x", "encoding_format": "int8"}, 400),
    ({"input": "x", "dimensions": 0}, 400),
    ({"input": "x", "truncate": "LEFT"}, 400),
    ({"input": "x", "truncate_prompt_tokens": -2}, 400),
    ({"input": "x", "normalize": "yes"}, 400),
    ({"input": "x", "model": 5}, 400),
]
"""Requests that neither the document nor the service accepts, with the status of the response."""


class Page(HTMLParser):
    """The URLs that a page loads or links to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.urls += [value for name, value in attrs if name in ("src", "href") and value]


@pytest.fixture(scope="module")
def document(service: Service) -> dict[str, Any]:
    """Return `/openapi.json`."""
    body: dict[str, Any] = service.http.get("/openapi.json").json()
    return body


def validator(document: dict[str, Any], schema: dict[str, Any]) -> Draft202012Validator:
    """Return a validator for a schema of the document."""
    return Draft202012Validator({"components": document["components"], **schema})


def test_the_url_of_the_service_is_relative_to_the_document(document: dict[str, Any]) -> None:
    """So it is right behind a proxy that adds a prefix; see also test_documentation_sends_requests_behind_a_prefix."""
    (server,) = document["servers"]
    assert urljoin("https://example.com/prefix/openapi.json", server["url"]) == "https://example.com/prefix/"


def operation(document: dict[str, Any], method: str, path: str) -> dict[str, Any]:
    found: dict[str, Any] = document["paths"][path][method]
    return found


def assert_described(document: dict[str, Any], method: str, path: str, response: httpx.Response) -> None:
    """Check that the document has the status and the body of a response."""
    responses = operation(document, method, path)["responses"]
    assert str(response.status_code) in responses, f"{response.status_code} is not in the document"
    schema = responses[str(response.status_code)]["content"]["application/json"]["schema"]
    assert schema, "an empty schema allows everything"
    validator(document, schema).validate(response.json())


def test_docs_page_loads_nothing_from_the_network(service: Service) -> None:
    """All URLs of the page are served by the service."""
    response = service.http.get("/docs")
    assert response.headers["content-type"].startswith("text/html")
    urls = Page(response.text).urls
    assert len(urls) >= 3
    page = f"{service.url}/docs"
    for url in [*urls, "openapi.json"]:
        target = urljoin(page, url)
        assert target.startswith(service.url)
        assert service.http.get(target).status_code == 200, url
    assert re.findall(r"https?://", response.text) == []
    assert "openapi.json" in response.text


def test_docs_page_uses_no_online_validator(service: Service) -> None:
    """Swagger UI does not send the document to its online validator."""
    assert re.search(r'"validatorUrl":\s*null', service.http.get("/docs").text)


@pytest.mark.parametrize(
    ("name", "media_type", "size"),
    [("swagger-ui-bundle.js", "text/javascript", 500_000), ("swagger-ui.css", "text/css", 50_000), ("favicon-32x32.png", "image/png", 100)],
)  # fmt: skip
def test_assets_of_the_docs_page(service: Service, name: str, media_type: str, size: int) -> None:
    """Swagger UI's files are complete and have their media types."""
    response = service.http.get(f"/docs/{name}")
    assert response.headers["content-type"].startswith(media_type)
    assert len(response.content) > size


def test_api_is_unchanged() -> None:
    """Paths, operation ids, parameters, statuses and fields are those in tests/data/openapi.txt.

    After an intended change, run `uv run python -m tests.api.openapi_outline` and commit the file.
    """
    assert outline(create_document()) == PATH.read_text(encoding="utf-8")


def test_document_is_valid(document: dict[str, Any]) -> None:
    """All schemas are valid and all references resolve, and FastAPI's own error schemas are not included."""
    assert document["openapi"].startswith("3.1")
    for schema in document["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    assert "HTTPValidationError" not in str(document)
    assert "422" not in str(document)
    references = set(re.findall(r"#/components/schemas/(\w+)", str(document)))
    assert references <= set(document["components"]["schemas"])


def test_each_field_of_a_request_is_described(document: dict[str, Any]) -> None:
    """The schemas of requests describe all their fields."""
    schemas = document["components"]["schemas"]
    properties = schemas["EmbeddingRequest"]["properties"]
    assert {"input", "model", "embedding_types", "top_k", "encoding_format", "dimensions", "input_type", "instruction", "truncate", "truncate_prompt_tokens", "truncation_side", "output_dtype", "normalize", "user"} == set(properties)  # fmt: skip
    for name in ("EmbeddingRequest", "RerankRequest", "ScoreRequest", "ClassifyRequest", "SimilarityRequest"):
        assert all(field["description"] for field in schemas[name]["properties"].values()), name


@pytest.mark.parametrize("request_body", VALID_REQUESTS, ids=str)
def test_valid_requests_and_their_responses_match_the_document(
    service: Service, document: dict[str, Any], request_body: dict[str, Any]
) -> None:
    """The document allows requests that the service answers, and describes the responses."""
    content = operation(document, "post", "/v1/embeddings")["requestBody"]["content"]["application/json"]
    validator(document, content["schema"]).validate(request_body)
    response = service.http.post("/v1/embeddings", json=request_body)
    assert response.status_code == 200
    assert_described(document, "post", "/v1/embeddings", response)


@pytest.mark.parametrize(("request_body", "status"), INVALID_REQUESTS, ids=lambda value: str(value)[:40])
def test_requests_that_violate_the_document_are_rejected(
    service: Service, document: dict[str, Any], request_body: dict[str, Any], status: int
) -> None:
    """The service rejects requests that the document does not allow, with errors that it describes."""
    content = operation(document, "post", "/v1/embeddings")["requestBody"]["content"]["application/json"]
    with pytest.raises(jsonschema.ValidationError):
        validator(document, content["schema"]).validate(request_body)
    response = service.http.post("/v1/embeddings", json=request_body)
    assert response.status_code == status
    assert_described(document, "post", "/v1/embeddings", response)


def test_other_routes_match_the_document(service: Service, strained: Service, document: dict[str, Any]) -> None:
    """The responses for models, health and readiness match, also if a model is not ready."""
    for path in ("/v1/models", "/health", "/ready"):
        assert_described(document, "get", path, service.http.get(path))
    for name in (BUNDLED, "nope"):
        assert_described(document, "get", "/v1/models/{model}", service.http.get(f"/v1/models/{name}"))
    assert_described(document, "get", "/ready", strained.http.get("/ready"))
    assert_described(document, "get", "/v1/models", strained.http.get("/v1/models"))
    assert "text/plain" in operation(document, "get", "/metrics")["responses"]["200"]["content"]


@pytest.mark.parametrize(
    ("method", "path", "query"),
    [
        ("get", "/api/models", ""),
        ("get", "/api/models/jobs", ""),
        ("get", "/api/models/jobs/{job_id}", ""),
        ("get", "/api/models/cache/list", ""),
        ("get", "/api/models/cache/list", "?al=true"),
        ("get", "/api/models/cache/{model_id}", ""),
        ("post", "/api/models/load", "?model_name=/etc"),
        ("post", "/api/models/unload", "?model_name=nope"),
        ("post", "/api/models/download", ""),
        ("post", "/api/models/transfer", "?model_name=a/b&destination=dir:/x"),
        ("delete", "/api/models/cache/{model_id}", "?wait_s=-1"),
    ],
)
def test_management_routes_match_the_document(
    service: Service, document: dict[str, Any], method: str, path: str, query: str
) -> None:
    """Responses and errors of management routes match the document."""
    url = path.replace("{job_id}", "nope").replace("{model_id}", "nope") + query
    assert_described(document, method, path, service.http.request(method, url))


def test_each_parameter_of_management_routes_is_described(document: dict[str, Any]) -> None:
    """All query parameters below /api have a description."""
    parameters = [
        parameter
        for path, operations in document["paths"].items()
        if path.startswith("/api")
        for each in operations.values()
        for parameter in each.get("parameters", ())
        if parameter["in"] == "query"
    ]
    assert len(parameters) > 20
    assert all(parameter["description"] for parameter in parameters)


def test_errors_of_the_server_match_the_document(strained: Service, document: dict[str, Any]) -> None:
    """All errors have the form that the document describes."""
    responses = [
        strained.embed("x", model="broken"),
        strained.embed(POISON, model="poisoned"),
        strained.embed("x", model="nope"),
        strained.http.post("/v1/embeddings", content=b"x", headers={"content-encoding": "br"}),
    ]
    assert [response.status_code for response in responses] == [503, 500, 404, 415]
    for response in responses:
        assert_described(document, "post", "/v1/embeddings", response)


def test_document_has_the_keys_that_routes_require(
    service: Service, guarded: Service, impatient: Service, document: dict[str, Any]
) -> None:
    """The document has a security scheme for each kind of configured key, and none without keys."""
    assert "securitySchemes" not in document["components"]
    with_keys = guarded.http.get("/openapi.json").json()
    assert with_keys["components"]["securitySchemes"]["apiKey"]["scheme"] == "bearer"
    assert operation(with_keys, "post", "/v1/embeddings")["security"] == [{"apiKey": []}]
    assert "security" not in operation(with_keys, "get", "/health")
    assert operation(with_keys, "get", "/api/models")["security"] == [{"apiKey": []}]
    with_admin_keys = impatient.http.get("/openapi.json").json()
    assert operation(with_admin_keys, "post", "/api/models/load")["security"] == [{"adminKey": []}]
    assert "security" not in operation(with_admin_keys, "post", "/v1/embeddings")
    assert with_admin_keys["components"]["securitySchemes"]["adminKey"]["scheme"] == "bearer"
    assert KEYS[0] not in str(with_keys)
