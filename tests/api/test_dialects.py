"""The routes of other APIs: each returns the vectors of `POST /v1/embeddings` and errors in the form of its API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from emb_model_provider.api.app import create_app
from emb_model_provider.settings import Settings
from tests.api.helpers import KEYS, ORIGIN, call
from tests.service import BUNDLED, assert_error, wait_until

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tests.service import Service

TEXTS = ["a cat sits on the mat", "向量数据库", ""]
LONG = "word " * 400
PUBLIC = {("GET", "/"), ("GET", "/health"), ("GET", "/ready"), ("GET", "/metrics"), ("GET", "/docs"), ("GET", "/docs/{name}")}  # fmt: skip
KEPT_OPEN = {"/api/embed", "/api/embeddings", "/api/tags", "/api/ps", "/api/show", "/api/version"}
"""Ollama's routes, which remote clients may use although they are below /api."""


def expected(service: Service, *texts: str, **fields: Any) -> NDArray[np.float32]:
    response = service.embed(list(texts), **fields)
    assert response.status_code == 200, response.text
    return np.array([item["embedding"] for item in response.json()["data"]], dtype=np.float32)


def assert_vectors(actual: Any, vectors: NDArray[np.float32]) -> None:
    np.testing.assert_allclose(np.array(actual, dtype=np.float32), vectors, atol=2e-3)


def post(service: Service, path: str, body: Any) -> Any:
    response = service.http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


# --- Ollama -------------------------------------------------------------------------------------------


def test_ollama_embed(service: Service) -> None:
    """/api/embed returns vectors of one text or of several, and the number of tokens."""
    body = post(
        service, "/api/embed", {"model": f"{BUNDLED}:latest", "input": TEXTS, "keep_alive": "5m", "options": {}}
    )
    assert_vectors(body["embeddings"], expected(service, *TEXTS))
    assert set(body) == {"model", "embeddings", "total_duration", "load_duration", "prompt_eval_count"}
    assert body["prompt_eval_count"] == service.embed(TEXTS).json()["usage"]["total_tokens"]
    assert body["total_duration"] > 0
    single = post(service, "/api/embed", {"model": BUNDLED, "input": TEXTS[0]})
    assert_vectors(single["embeddings"], expected(service, TEXTS[0]))


def test_ollama_embeddings(service: Service) -> None:
    """/api/embeddings returns the vector of a prompt."""
    body = post(service, "/api/embeddings", {"model": BUNDLED, "prompt": TEXTS[0]})
    assert_vectors([body["embedding"]], expected(service, TEXTS[0]))


def test_ollama_describes_models(service: Service) -> None:
    """Clients list the models, and read the size of vectors and the longest input."""
    (model,) = service.http.get("/api/tags").json()["models"]
    assert model["name"] == model["model"] == BUNDLED
    assert [each["name"] for each in service.http.get("/api/ps").json()["models"]] == [BUNDLED]
    shown = post(service, "/api/show", {"model": "all-minilm-l6-v2"})
    assert shown["capabilities"] == ["embedding"]
    assert shown["model_info"]["embedding.embedding_length"] == 384
    assert shown["model_info"]["embedding.context_length"] == 256
    assert service.http.get("/api/version").json()["version"].count(".") == 2


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/api/embed", {"input": "x"}, 400),
        ("/api/embed", {"model": BUNDLED}, 400),
        ("/api/embed", {"model": "nope", "input": "x"}, 404),
        ("/api/embed", {"model": BUNDLED, "input": LONG, "truncate": False}, 400),
        ("/api/embeddings", {"model": BUNDLED, "prompt": ["x"]}, 400),
        ("/api/show", {"model": "nope"}, 404),
        ("/api/tags", {}, 405),
    ],
)
def test_ollama_errors(service: Service, path: str, body: Any, status: int) -> None:
    """Errors are a text, as Ollama's clients expect."""
    response = service.http.post(path, json=body)
    assert response.status_code == status
    assert set(response.json()) == {"error"}
    assert isinstance(response.json()["error"], str)
    assert int(response.headers["content-length"]) == len(response.content)


# --- TEI ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/embed", "/"])
def test_tei_embed(service: Service, path: str) -> None:
    """The answer is an array of vectors, also for one text. They are normalized unless the request says otherwise."""
    assert_vectors(post(service, path, {"inputs": TEXTS, "truncate": True}), expected(service, *TEXTS))
    assert_vectors(post(service, path, {"inputs": TEXTS[0]}), expected(service, TEXTS[0]))
    fields = {"inputs": LONG, "normalize": False, "truncate": True, "truncation_direction": "Left"}
    assert_vectors(post(service, path, fields), expected(service, LONG, normalize=False, truncate="START"))


@pytest.mark.parametrize("path", ["/similarity", "/"])
def test_tei_similarity(service: Service, path: str) -> None:
    """Each sentence gets its cosine to the source."""
    vectors = expected(service, *TEXTS)
    inputs = {"source_sentence": TEXTS[0], "sentences": TEXTS[1:]}
    assert_vectors(post(service, path, {"inputs": inputs, "parameters": {"truncate": True}}), vectors[1:] @ vectors[0])


def test_tei_tokenize(service: Service) -> None:
    """Each token has its id, its characters, and where they are in the text."""
    (row,) = post(service, "/tokenize", {"inputs": "Hello, 向量"})
    assert [token["text"] for token in row] == ["[CLS]", "Hello", ",", "向", "量", "[SEP]"]
    assert [(token["start"], token["stop"]) for token in row] == [(None, None), (0, 5), (5, 6), (7, 8), (8, 9), (None, None)]  # fmt: skip
    assert [token["special"] for token in row] == [True, False, False, False, False, True]
    rows = post(service, "/tokenize", {"inputs": [*TEXTS, LONG], "add_special_tokens": False})
    assert [len(row) for row in rows][2:] == [0, 400]


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
def test_vllm_tokenize(service: Service, path: str) -> None:
    """The number of tokens is that in `usage` of a request for embeddings."""
    body = post(service, path, {"model": BUNDLED, "prompt": TEXTS[0]})
    usage = service.embed(TEXTS[0]).json()["usage"]
    assert (body["count"], body["max_model_len"]) == (usage["total_tokens"], 256)
    assert len(body["tokens"]) == body["count"]


@pytest.mark.parametrize("fields", [{}, {"inputs": []}, {"inputs": ["x", 1]}, {"inputs": ["x"] * 2049}, {"inputs": LONG * 800}, {"prompt": 1}, {"inputs": "x", "model": 1}, {"inputs": "x", "add_special_tokens": 1}])  # fmt: skip
def test_invalid_requests_for_tokens(service: Service, fields: Any) -> None:
    """The texts are limited as those of a request for embeddings."""
    response = service.http.post("/tokenize", json=fields)
    assert (response.status_code, set(response.json())) == (400, {"error", "error_type"})


def test_tei_info(service: Service) -> None:
    """Clients read the longest input and the largest batch."""
    info = service.http.get("/info").json()
    assert (info["model_id"], info["max_input_length"], info["max_client_batch_size"]) == (BUNDLED, 256, 2048)
    assert info["model_type"] == {"embedding": {"pooling": "mean"}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/embed", {}),
        ("/tokenize", {}),
        ("/embed", {"inputs": []}),
        ("/embed", {"inputs": "x", "truncation_direction": "up"}),
        ("/embed", {"inputs": LONG, "truncate": False}),
        ("/", {"inputs": {"source_sentence": "x"}}),
        ("/similarity", {"inputs": "x"}),
        ("/similarity", {"inputs": {"source_sentence": "x", "sentences": ["y"]}, "parameters": 1}),
    ],
)
def test_tei_errors(service: Service, path: str, body: Any) -> None:
    """Errors have a text and a type, as those of TEI."""
    response = service.http.post(path, json=body)
    assert response.status_code == 400
    assert set(response.json()) == {"error", "error_type"}
    assert response.json()["error_type"] == "Validation"


# --- Cohere, Azure, llamafile, Xinference -------------------------------------------------------------


def test_cohere_v1(service: Service) -> None:
    """Vectors are an array, or grouped by type if the request names a type."""
    fields = {"model": BUNDLED, "texts": TEXTS, "input_type": "search_document", "truncate": "END"}
    body = post(service, "/v1/embed", fields)
    assert (body["response_type"], body["texts"]) == ("embeddings_floats", TEXTS)
    assert_vectors(body["embeddings"], expected(service, *TEXTS))
    by_type = post(service, "/v1/embed", {**fields, "embedding_types": ["float"]})
    assert by_type["response_type"] == "embeddings_by_type"
    assert_vectors(by_type["embeddings"]["float"], expected(service, *TEXTS))


def test_cohere_v2(service: Service) -> None:
    """Vectors are grouped by type. Texts can also be parts of `inputs`."""
    body = post(service, "/v2/embed", {"model": BUNDLED, "texts": TEXTS, "input_type": "search_query"})
    assert_vectors(body["embeddings"]["float"], expected(service, *TEXTS))
    assert body["meta"]["billed_units"]["input_tokens"] > len(TEXTS)
    inputs = [{"content": [{"type": "text", "text": text}]} for text in TEXTS]
    body = post(service, "/v2/embed", {"model": BUNDLED, "inputs": inputs, "input_type": "search_query"})
    assert_vectors(body["embeddings"]["float"], expected(service, *TEXTS))
    assert body["texts"] == TEXTS


@pytest.mark.parametrize(
    "body",
    [
        {"model": BUNDLED},
        {"model": BUNDLED, "images": ["data:image/png;base64,AA"]},
        {"model": BUNDLED, "inputs": [{"content": [{"type": "image_url"}]}]},
        {"model": BUNDLED, "texts": ["x"], "embedding_types": ["int3"]},
        {"model": BUNDLED, "texts": ["x"], "embedding_types": []},
        {"model": BUNDLED, "texts": ["x"], "embedding_types": "float"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/embed", "/v2/embed"])
def test_cohere_errors(service: Service, path: str, body: Any) -> None:
    """Errors have a message at the top level, as those of Cohere."""
    response = service.http.post(path, json=body)
    assert response.status_code == 400
    assert set(response.json()) == {"message"}


def test_azure(service: Service) -> None:
    """The path names the model, whatever the body says, and may contain slashes."""
    path = f"/openai/deployments/{BUNDLED}/embeddings?api-version=2024-10-21"
    body = post(service, path, {"input": TEXTS, "model": "text-embedding-3-large"})
    assert_vectors([item["embedding"] for item in body["data"]], expected(service, *TEXTS))
    assert_error(
        service.http.post("/openai/deployments/nope/embeddings", json={"input": "x"}),
        404,
        "model_not_found",
        param="model",
    )


def test_llamafile(service: Service) -> None:
    """One text gets `embedding`, several get `results`."""
    assert_vectors([post(service, "/embedding", {"content": TEXTS[0]})["embedding"]], expected(service, TEXTS[0]))
    results = post(service, "/embedding", {"content": TEXTS})["results"]
    assert_vectors([result["embedding"] for result in results], expected(service, *TEXTS))
    unscaled = post(service, "/embedding", {"input": TEXTS[0], "embd_normalize": -1})
    assert_vectors([unscaled["embedding"]], expected(service, TEXTS[0], normalize=False))
    response = service.http.post("/embedding", json={"content": "x", "embd_normalize": 1})
    assert_error(response, 400, "invalid_value", param="embd_normalize")


def test_xinference_fields(service: Service) -> None:
    """Clients of Xinference read the kind of a model and its longest input."""
    model = service.http.get(f"/v1/models/{BUNDLED}").json()
    assert (model["model_type"], model["model_name"], model["max_tokens"]) == ("embedding", BUNDLED, 256)


# --- access -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["api-key", "x-api-key"])
def test_keys_in_other_headers(guarded: Service, header: str) -> None:
    """Azure's clients send the key in `api-key`, others in `x-api-key`."""
    assert call(guarded, "GET", "/v1/models", **{header: KEYS[1].encode()}).status_code == 200
    assert (
        call(guarded, "GET", "/v1/models", **{header: KEYS[0].encode(), "authorization": "Bearer x"}).status_code == 200
    )
    response = call(guarded, "GET", "/v1/models", **{header: "sk-wrong"})
    assert_error(response, 401, "invalid_api_key", phrase="Incorrect API key")
    assert call(guarded, "POST", "/api/x", **{header: KEYS[0].encode()}).status_code == 401


async def test_every_route_requires_a_key() -> None:
    """Only monitoring, documentation and the description of the service are open, also in other spellings.

    The console has sessions instead; see `console/test_access.py`.
    """
    app = create_app(Settings.from_values(api_keys=KEYS[0]), on_nothing_to_serve=lambda: None)
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
        routes = {(method, path) for path, methods in app.state.methods.items() for method in methods}
        routes = {(method, path) for method, path in routes if not path.startswith("/console")}
        assert routes > PUBLIC
        for method, path in routes - PUBLIC:
            for spelling in (path, f"/{path}", f"{path}/", f"/v1{path}"):
                url = f"http://localhost{spelling}".replace("{", "").replace("}", "")
                response = await http.request(method, url)
                assert response.status_code == 401, (method, spelling)


@pytest.mark.parametrize("path", sorted(KEPT_OPEN))
def test_remote_clients_may_use_ollamas_routes(service: Service, path: str) -> None:
    """They do not change the service, so that the rule for the other routes below /api does not apply."""
    for method in ("GET", "POST"):
        assert call(service, method, path, x_forwarded_for="10.0.0.1").status_code in (200, 400, 405)


def test_ollamas_routes_require_a_key_and_have_its_errors(guarded: Service) -> None:
    """The key is that of the other routes, and pages of allowed origins may send requests."""
    response = call(guarded, "GET", "/api/tags")
    assert (response.status_code, set(response.json())) == (401, {"error"})
    allowed = call(guarded, "GET", "/api/tags", authorization=f"Bearer {KEYS[0]}", origin=ORIGIN)
    assert allowed.headers["access-control-allow-origin"] == ORIGIN


def test_requests_of_all_dialects_are_counted(service: Service) -> None:
    """The metrics of requests include other APIs."""
    before = service.figure("emb_provider_inputs_total", model=BUNDLED)
    post(service, "/api/embed", {"model": BUNDLED, "input": TEXTS})
    post(service, "/embed", {"inputs": TEXTS})
    post(service, "/v2/embed", {"model": BUNDLED, "texts": TEXTS})
    post(service, f"/openai/deployments/{BUNDLED}/embeddings", {"input": TEXTS})
    # The last request is counted after its response was sent.
    wait_until(lambda: service.figure("emb_provider_inputs_total", model=BUNDLED) == before + 4 * len(TEXTS))
