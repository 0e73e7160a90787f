"""/docs and /openapi.json: complete on this machine, and true."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

import jsonschema
import pytest
from jsonschema import Draft202012Validator

from tests.api.models import KEYS, POISON
from tests.service import BUNDLED

if TYPE_CHECKING:
    import httpx

    from tests.service import Service

REQUESTS: list[dict[str, Any]] = [
    {"input": "hello"},
    {"model": BUNDLED, "input": ["a", "b"], "encoding_format": "base64", "user": "me"},
    {"model": None, "input": "", "dimensions": None, "normalize": None, "encoding_format": None},
    {
        "input": ["x"],
        "dimensions": 384,
        "input_type": "query",
        "truncate": "START",
        "truncate_prompt_tokens": 5,
    },
    {"input": "x", "truncate": True, "normalize": False, "anything": {"else": 1}},
]
REFUSED: list[tuple[dict[str, Any], int]] = [
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
"""What both the description and the service refuse."""


class Document(HTMLParser):
    """The URLs that a page loads or links, and its inline scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.urls += [value for name, value in attrs if name in ("src", "href") and value]


@pytest.fixture(scope="module")
def description(service: Service) -> dict[str, Any]:
    """Return /openapi.json."""
    body: dict[str, Any] = service.http.get("/openapi.json").json()
    return body


def validator(description: dict[str, Any], schema: dict[str, Any]) -> Draft202012Validator:
    """Return a validator of one of the description's schemas."""
    return Draft202012Validator({"components": description["components"], **schema})


def operation(description: dict[str, Any], method: str, path: str) -> dict[str, Any]:
    found: dict[str, Any] = description["paths"][path][method]
    return found


def assert_described(description: dict[str, Any], method: str, path: str, response: httpx.Response) -> None:
    """Check that a response has a status and a body that the description says it may have."""
    responses = operation(description, method, path)["responses"]
    assert str(response.status_code) in responses, f"{response.status_code} is not described"
    schema = responses[str(response.status_code)]["content"]["application/json"]["schema"]
    assert schema, "an empty schema describes nothing"
    validator(description, schema).validate(response.json())


def test_page_needs_nothing_from_elsewhere(service: Service) -> None:
    """Every URL in the page is served here, and no other address is in it."""
    response = service.http.get("/docs")
    assert response.headers["content-type"].startswith("text/html")
    urls = Document(response.text).urls
    assert len(urls) >= 3
    page = f"{service.url}/docs"
    for url in [*urls, "openapi.json"]:
        target = urljoin(page, url)
        assert target.startswith(service.url)
        assert service.http.get(target).status_code == 200, url
    assert re.findall(r"https?://", response.text) == []
    assert "openapi.json" in response.text


def test_page_asks_no_validator_on_the_web(service: Service) -> None:
    """Swagger UI's validator, which would be sent the description, is off."""
    assert re.search(r'"validatorUrl":\s*null', service.http.get("/docs").text)


@pytest.mark.parametrize(
    ("name", "media_type", "size"),
    [("swagger-ui-bundle.js", "text/javascript", 500_000), ("swagger-ui.css", "text/css", 50_000), ("favicon-32x32.png", "image/png", 100)],
)  # fmt: skip
def test_files_of_the_page(service: Service, name: str, media_type: str, size: int) -> None:
    """Swagger UI's own files are whole, and say what they are."""
    response = service.http.get(f"/docs/{name}")
    assert response.headers["content-type"].startswith(media_type)
    assert len(response.content) > size


def test_description_is_well_formed(description: dict[str, Any]) -> None:
    """All its schemas are schemas, and nothing of FastAPI's own errors is left in it."""
    assert description["openapi"].startswith("3.1")
    assert set(description["paths"]) == {
        "/v1/embeddings", "/v1/models", "/v1/models/{model}", "/health", "/ready", "/metrics",
        "/api/models", "/api/models/load", "/api/models/unload", "/api/models/download",
        "/api/models/jobs", "/api/models/jobs/{job_id}", "/api/models/jobs/{job_id}/events",
        "/api/models/cache/list", "/api/models/cache/all", "/api/models/cache/{model_id}",
        "/api/models/cache/{model_id}/verify",
    }  # fmt: skip
    for schema in description["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    assert "HTTPValidationError" not in str(description)
    assert "422" not in str(description)
    references = set(re.findall(r"#/components/schemas/(\w+)", str(description)))
    assert references <= set(description["components"]["schemas"])


def test_each_field_is_explained(description: dict[str, Any]) -> None:
    """Whoever reads the request's schema learns what each field is for."""
    properties = description["components"]["schemas"]["EmbeddingRequest"]["properties"]
    assert {"input", "model", "encoding_format", "dimensions", "input_type", "truncate", "truncate_prompt_tokens", "normalize", "user"} == set(properties)  # fmt: skip
    assert all(field["description"] for field in properties.values())


@pytest.mark.parametrize("request_body", REQUESTS, ids=str)
def test_answered_requests_and_their_answers_are_as_described(
    service: Service, description: dict[str, Any], request_body: dict[str, Any]
) -> None:
    """What the service answers, the description allows; and the answer is what it says."""
    content = operation(description, "post", "/v1/embeddings")["requestBody"]["content"]["application/json"]
    validator(description, content["schema"]).validate(request_body)
    response = service.http.post("/v1/embeddings", json=request_body)
    assert response.status_code == 200
    assert_described(description, "post", "/v1/embeddings", response)


@pytest.mark.parametrize(("request_body", "status"), REFUSED, ids=lambda value: str(value)[:40])
def test_refused_requests_are_not_allowed_by_the_description(
    service: Service, description: dict[str, Any], request_body: dict[str, Any], status: int
) -> None:
    """What the description forbids, the service refuses, with an error that is described."""
    content = operation(description, "post", "/v1/embeddings")["requestBody"]["content"]["application/json"]
    with pytest.raises(jsonschema.ValidationError):
        validator(description, content["schema"]).validate(request_body)
    response = service.http.post("/v1/embeddings", json=request_body)
    assert response.status_code == status
    assert_described(description, "post", "/v1/embeddings", response)


def test_other_routes_are_as_described(
    service: Service, strained: Service, description: dict[str, Any]
) -> None:
    """Models, health and readiness, the last also while not ready."""
    for path in ("/v1/models", "/health", "/ready"):
        assert_described(description, "get", path, service.http.get(path))
    for name in (BUNDLED, "nope"):
        assert_described(description, "get", "/v1/models/{model}", service.http.get(f"/v1/models/{name}"))
    assert_described(description, "get", "/ready", strained.http.get("/ready"))
    assert_described(description, "get", "/v1/models", strained.http.get("/v1/models"))
    assert "text/plain" in operation(description, "get", "/metrics")["responses"]["200"]["content"]


def test_managing_is_as_described(service: Service, description: dict[str, Any]) -> None:
    """What is looked at, and what is refused, has the form that the description shows; each parameter is explained."""
    for method, path, given in (
        ("get", "/api/models", ""),
        ("get", "/api/models/jobs", ""),
        ("get", "/api/models/jobs/{job_id}", ""),
        ("get", "/api/models/cache/list", ""),
        ("get", "/api/models/cache/list", "?al=true"),
        ("get", "/api/models/cache/{model_id}", ""),
        ("post", "/api/models/load", "?model_name=/etc"),
        ("post", "/api/models/unload", "?model_name=nope"),
        ("post", "/api/models/download", ""),
        ("delete", "/api/models/cache/{model_id}", "?wait_s=-1"),
    ):
        url = path.replace("{job_id}", "nope").replace("{model_id}", "nope") + given
        assert_described(description, method, path, service.http.request(method, url))
    for path, operations in description["paths"].items():
        if path.startswith("/api"):
            for method, each in operations.items():
                parameters = [one for one in each.get("parameters", ()) if one["in"] == "query"]
                assert all(one["description"] for one in parameters), (method, path)
                assert each["tags"] == ["management"]


def test_errors_of_the_server_are_as_described(strained: Service, description: dict[str, Any]) -> None:
    """Failures and refusals have the one form that the description shows."""
    answers = [
        strained.embed("x", model="broken"),
        strained.embed(POISON, model="poisoned"),
        strained.embed("x", model="nope"),
        strained.http.post("/v1/embeddings", content=b"x", headers={"content-encoding": "gzip"}),
    ]
    assert [answer.status_code for answer in answers] == [503, 500, 404, 415]
    for answer in answers:
        assert_described(description, "post", "/v1/embeddings", answer)
    statuses = set(operation(description, "post", "/v1/embeddings")["responses"])
    assert statuses == {"200", "400", "401", "404", "408", "413", "415", "429", "500", "503", "504"}


def test_keys_are_in_the_description_where_they_are_asked_for(
    service: Service, guarded: Service, edge: Service, description: dict[str, Any]
) -> None:
    """With keys, /docs offers to enter one, or the one that the route asks for; without, it does not."""
    assert "securitySchemes" not in description["components"]
    guarded_description = guarded.http.get("/openapi.json").json()
    assert guarded_description["components"]["securitySchemes"]["apiKey"]["scheme"] == "bearer"
    assert operation(guarded_description, "post", "/v1/embeddings")["security"] == [{"apiKey": []}]
    assert "security" not in operation(guarded_description, "get", "/health")
    assert operation(guarded_description, "get", "/api/models")["security"] == [{"apiKey": []}]
    edge_description = edge.http.get("/openapi.json").json()
    assert operation(edge_description, "post", "/api/models/load")["security"] == [{"adminKey": []}]
    assert "security" not in operation(edge_description, "post", "/v1/embeddings")
    assert edge_description["components"]["securitySchemes"]["adminKey"]["scheme"] == "bearer"
    assert KEYS[0] not in str(guarded_description)
