"""Spellings of URLs: those that users and clients send reach the right route, and no other ones do."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emb_model_provider.api.app import create_app
from emb_model_provider.api.paths import is_admin_path, is_inference_request, normalize_path
from emb_model_provider.settings import Settings
from tests.api.helpers import call
from tests.service import BUNDLED, assert_error

if TYPE_CHECKING:
    from tests.service import Service

EMBEDDINGS = [
    "/v1/embeddings",
    "/embeddings",
    "/v1/embeddings/",
    "//v1/embeddings",
    "/v1//embeddings",
    "/v1/v1/embeddings",
    "/v1/embeddings/embeddings",
    "/v1/embeddings/v1/embeddings",
    "/api/v1/embeddings",
    "/api/v3/embeddings",
    "/openai/v1/embeddings",
    "/v2/embeddings",
    "/v3/embeddings",
    "/engines/v1/embeddings",
    "/engines/llama.cpp/v1/embeddings",
    "/compatible-mode/v1/embeddings",
    "/compatible-mode/v1/v1/embeddings/",
]
OTHERS = {
    "/models": "/v1/models",
    "/v1/models/": "/v1/models",
    "/api/v1/models/BAAI/bge-m3": "/v1/models/BAAI/bge-m3",
    "/v1/models//data/model": "/v1/models//data/model",
    "/v1/v2/embed": "/v2/embed",
    "/v1/v1/embed": "/v1/embed",
    "//v2/embed/": "/v2/embed",
    "/v1/api/embed": "/api/embed",
    "/api/api/tags": "/api/tags",
    "//api/version": "/api/version",
    "/openai/openai/deployments/BAAI/bge-m3/embeddings": "/openai/deployments/BAAI/bge-m3/embeddings",
    "/openai/v1/deployments/x/embeddings": "/openai/deployments/x/embeddings",
    "/v1/engines/x/embeddings": "/openai/deployments/x/embeddings",
    "//embed": "/embed",
    "/embed_sparse/": "/embed_sparse",
    "/rerank/": "/rerank",
    "/rerank/rerank": "/rerank",
    "/v1/rerank": "/v1/rerank",
    "/v1/v1/rerank": "/v1/rerank",
    "/v1/rerank/rerank": "/v1/rerank",
    "/api/v1/reranks": "/v1/rerank",
    "/compatible-api/v1/reranks": "/v1/rerank",
    "/v2/rerank": "/v2/rerank",
    "/v1/v2/rerank": "/v2/rerank",
    "/score": "/v1/score",
    "/v1/v1/score": "/v1/score",
    "/classify": "/v1/classify",
    "/v1/similarity/": "/v1/similarity",
    "/similarity/": "/similarity",
    "/api/v1/services/rerank/text-rerank/text-rerank": "/services/rerank/text-rerank/text-rerank",
    "/tokenize/": "/tokenize",
    "/files": "/v1/files",
    "/v1/v1/files/": "/v1/files",
    "/openai/v1/files/file-1/content": "/v1/files/file-1/content",
    "/batches/batch_1/cancel/": "/v1/batches/batch_1/cancel",
    "/v1//batches/batch_1": "/v1/batches/batch_1",
}
UNCHANGED = [
    "/", "/v1", "/metrics/", "//metrics", "/v1/ready", "/docs", "/docs/", "/docs/swagger-ui.css", "/openapi.json", "/v1/embedding", "/v4/embeddings", "/v1/embeddings/x",
    "/api/models", "/api/models/", "//api/models", "/api//models/load", "/v1/api/models", "/api/api/models/load", "/API/models",
    "/api/models/cache/all", "/api/models/cache//data/x", "/api/models/embed", "/api/embed/models",
]  # fmt: skip
PARTS = [
    "api", "v1", "v2", "v3", "openai", "engines", "compatible-mode", "deployments", "models", "embeddings", "embed", "tags",
    "load", "unload", "download", "cache", "jobs", "all", "x", "..", ".", "", "rerank", "score", "similarity",
    "files", "content",
]  # fmt: skip


@pytest.mark.parametrize("path", EMBEDDINGS)
def test_spellings_of_the_url_for_embeddings(service: Service, path: str) -> None:
    """Base URLs with and without /v1, those of other services, slashes too many, and paths that clients append."""
    response = call(service, "POST", path)
    assert_error(response, 400, "invalid_json")
    answered = service.http.post(path, json={"input": "hello"})
    assert len(answered.json()["data"][0]["embedding"]) == 384


@pytest.mark.parametrize(("path", "route"), OTHERS.items())
def test_spellings_of_other_urls(path: str, route: str) -> None:
    """Ids of models are not changed, because they may be directories."""
    assert normalize_path(path) == route


@pytest.mark.parametrize("path", UNCHANGED)
def test_other_paths_are_not_changed(path: str) -> None:
    """This includes routes for management and monitoring, and everything that resembles them."""
    assert normalize_path(path) == path


@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=7).map(lambda parts: "/" + "/".join(parts)))
def test_no_spelling_reaches_a_management_route(path: str) -> None:
    """A management route is reached under its own path only, and normalizing again changes nothing."""
    normalized = normalize_path(path)
    assert normalized == path or not is_admin_path(normalized)
    assert normalize_path(normalized) == normalized


@pytest.mark.parametrize("path", ["/v1/api/models/load", "//api/models/load", "/api/api/models/load", "/api/v1/api/models/load", "/openai/api/models/load"])  # fmt: skip
def test_management_routes_have_one_url(service: Service, path: str) -> None:
    """Prefixes that other routes allow do not lead to management routes."""
    response = call(service, "POST", f"{path}?model_name=mini")
    assert_error(response, 404, "unknown_url")


@pytest.mark.parametrize("path", ["/api/models", "/api/models/load", "/api/models/unload", "/api/models/cache/list"])
@pytest.mark.parametrize("prefix", ["", "/", "/api", "/v1", "/api/v1"])
def test_admin_rule_applies_to_the_normalized_path(service: Service, prefix: str, path: str) -> None:
    """A remote client gets to no management route, whatever it puts before the path."""
    for method in ("GET", "POST", "DELETE"):
        assert call(service, method, prefix + path, x_forwarded_for="10.0.0.1").status_code in (403, 404, 405)


async def test_all_routes_that_run_a_model_are_counted() -> None:
    """Metrics, quotas and traces apply to every POST route, except those that only describe, tokenize or manage."""
    app = create_app(Settings.from_values(console=False), on_nothing_to_serve=lambda: None)
    paths = {path for path, methods in app.state.methods.items() if "POST" in methods and "/api/models" not in path}
    counted = {path for path in paths if is_inference_request("POST", path)}
    batches = {"/v1/batches", "/v1/batches/{batch_id}/cancel", "/v1/files"}
    assert paths - counted == {"/api/show", "/tokenize", "/v1/tokenize"} | batches
    assert {"/v1/rerank", "/rerank", "/v2/rerank", "/v1/score", "/v1/classify", "/predict", "/embed_all"} < counted


def test_long_paths_take_no_longer() -> None:
    """The patterns need time proportional to the length of a path."""
    parts = ["/", "/v1", "v1", "/engines", "/embeddings", "/deployments", "/api", "/openai", "/models", "x"]
    started = time.perf_counter()
    for head in parts:
        for repeated in parts:
            for end in ("", "y", "/y"):
                normalize_path(f"/{head}{repeated * (60_000 // len(repeated))}{end}")
    assert time.perf_counter() - started < 30


def test_unknown_path_names_the_nearest_route(service: Service) -> None:
    """The error suggests a route, or the documentation if no route is similar."""
    for path, suggestion in {
        "/v1/embedding": "Did you mean POST /v1/embeddings?",
        "/v1/embeddings/create": "Did you mean POST /v1/embeddings?",
        "/api/embedd": "Did you mean POST /api/embed?",
        "/1234": "/docs lists the routes.",
    }.items():
        response = service.http.post(path)
        assert_error(response, 404, "unknown_url", phrase=f"Invalid URL (POST {path}). {suggestion}")


def test_wrong_method_names_the_right_one(service: Service) -> None:
    """Opening the URL of a route in a browser shows which method it has."""
    response = service.http.get("/v1/embeddings")
    assert_error(response, 405, "method_not_allowed", phrase="GET is not a method of this route. Use POST.")
    assert response.headers["allow"] == "POST"


def test_root_says_what_the_service_is(service: Service) -> None:
    """The base URL in a browser shows where the documentation is, and that is where it says."""
    about = service.http.get("/").json()
    assert (about["name"], about["default_model"]) == ("emb-model-provider", BUNDLED)
    for link in (about["documentation"], about["models"], about["state"]):
        assert service.http.get(link).status_code == 200
    assert service.http.post(f"{about['base_url']}/embeddings", json={"input": "x"}).status_code == 200
