"""Applications: the class of Dify's SDK itself, and the requests of others, as their source code builds them.

Those of FastGPT, AnythingLLM and n8n, which use SDKs for JavaScript, are in `node/applications.mjs`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ollama
import openai
import pytest

from tests.clients.helpers import IGNORE_WARNINGS, KEY, QUERY, TEXTS, Reference, assert_vectors, run_with_dify

if TYPE_CHECKING:
    from tests.service import Service

pytestmark = [pytest.mark.slow, IGNORE_WARNINGS]

ENTERED = ("", "/", "/v1", "/v1/")
"""Ends of base URLs that users enter."""


def test_dify(clients: Service, reference: Reference) -> None:
    """The class of the plugin SDK checks the credentials and gets vectors, under each URL."""
    results = run_with_dify("dify_sdk", url=clients.url, key=KEY, texts=TEXTS[:3])
    for vectors in results["vectors"].values():
        assert_vectors(vectors, reference(*TEXTS[:3]))
    assert_vectors(results["query"], reference(TEXTS[0], prompt=QUERY))
    assert results["tokens"] > 0
    assert results["error"] == "Credentials validation failed with status code 404"


def test_ragflow(clients: Service, reference: Reference) -> None:
    """RAGFlow ends the URL in a version: by joining `v1` until 0.26, by appending `/v1` where none is since then."""
    vectors = reference(*TEXTS)
    for base in ("/v1", "//v1", "/v1/v1", "/v1/"):
        with openai.OpenAI(base_url=clients.url + base, api_key=KEY) as client:
            # The additional field is one of LiteLLM.
            response = client.embeddings.create(
                model="mini", input=TEXTS, encoding_format="float", extra_body={"drop_params": True}
            )
        assert_vectors([item.embedding for item in response.data], vectors)
        assert response.usage.total_tokens > 0


def test_ragflow_with_ollama(clients: Service, reference: Reference) -> None:
    """RAGFlow's class for Ollama; until 0.26 it used the older route for queries."""
    client = ollama.Client(host=clients.url, headers={"Authorization": f"Bearer {KEY}"})
    options: dict[str, Any] = {"options": {"use_mmap": True}, "keep_alive": -1}
    response = client.embed(model="mini", input=TEXTS, truncate=True, **options)
    assert_vectors(response.embeddings, reference(*TEXTS))
    assert response.get("prompt_eval_count")
    assert_vectors([client.embeddings(model="mini", prompt=TEXTS[0], **options).embedding], reference(TEXTS[0]))


def test_ragflow_with_tei(clients: Service, reference: Reference) -> None:
    """RAGFlow's class for text-embeddings-inference sends an array for documents and a text for queries, but no key."""
    vectors = reference(*TEXTS)
    documents = clients.http.post("/embed", json={"inputs": TEXTS})
    query = clients.http.post("/embed", json={"inputs": TEXTS[0]})
    assert_vectors(documents.json(), vectors)
    assert_vectors(query.json()[0], vectors[0])


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings"], ids=["1.x", "2.x"])
def test_spring_ai(clients: Service, reference: Reference, path: str) -> None:
    """Spring AI appends a path, which depends on its version. Java's HTTP client asks for HTTP/2."""
    vectors = reference(*TEXTS)
    upgrade = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAEAAEAAAAIAAAAAAAMAAAAA"}
    for end in ENTERED:
        body = {"input": TEXTS, "model": "mini"}
        response = clients.http.post(clients.url + end + path, json=body, headers=upgrade).json()
        assert_vectors([item["embedding"] for item in response["data"]], vectors)


def test_one_api(clients: Service, reference: Reference) -> None:
    """One API appends a path, which depends on the type of the channel, and forwards the body."""
    vectors = reference(*TEXTS)
    body = {"model": "mini", "input": TEXTS, "user": "a-user"}
    for path in ("/v1", "/v1/v1", "", "/v2", "/api/v3", "/compatible-mode/v1"):
        response = clients.http.post(f"{path}/embeddings", json=body, headers={"Accept": "*/*"}).json()
        assert response["usage"]["prompt_tokens"] == response["usage"]["total_tokens"] > 0
        assert_vectors([item["embedding"] for item in response["data"]], vectors)


def test_one_api_for_azure(clients: Service, reference: Reference) -> None:
    """A channel of type Azure has the model in the path and the key in `api-key`."""
    headers = {"Authorization": "", "api-key": KEY}
    path = "/openai/deployments/mini/embeddings?api-version=2024-03-01-preview"
    response = clients.http.post(path, json={"model": "mini", "input": TEXTS}, headers=headers)
    assert_vectors([item["embedding"] for item in response.json()["data"]], reference(*TEXTS))
