"""The SDK of OpenAI, as such, for Azure, and in LlamaIndex, with base URLs as users enter them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import openai
import pytest

from tests.clients.helpers import IGNORE_WARNINGS, KEY, QUERY, TEXTS, Reference, assert_vectors

if TYPE_CHECKING:
    from tests.service import Service

pytestmark = [pytest.mark.slow, IGNORE_WARNINGS]

BASE_URLS = ["/v1", "/v1/", "", "/", "//v1", "/v1/v1", "/v1/embeddings", "/api/v1", "/api/v3", "/openai/v1", "/engines/v1", "/compatible-mode/v1"]  # fmt: skip


@pytest.mark.parametrize("path", BASE_URLS)
def test_base_urls(clients: Service, reference: Reference, path: str) -> None:
    """Vectors are correct under each base URL. The SDK requests base64."""
    with openai.OpenAI(base_url=f"{clients.url}{path}", api_key=KEY, max_retries=0) as client:
        response = client.embeddings.create(model="mini", input=TEXTS)
    assert_vectors([item.embedding for item in response.data], reference(*TEXTS))


async def test_asynchronous_client(clients: Service, reference: Reference) -> None:
    """The asynchronous client gets the same vectors."""
    async with openai.AsyncOpenAI(base_url=f"{clients.url}/v1", api_key=KEY) as client:
        response = await client.embeddings.create(model="text-embedding-3-small", input=TEXTS, encoding_format="float")
        assert [model.id async for model in client.models.list()] == ["mini", "text-embedding-3-small", "text-embedding-ada-002", "nomic-embed-text", "for-queries"]  # fmt: skip
    assert_vectors([item.embedding for item in response.data], reference(*TEXTS))


def test_raw_response(clients: Service, reference: Reference) -> None:
    """The raw response has the request id and the number of truncated inputs."""
    with openai.OpenAI(base_url=f"{clients.url}/v1", api_key=KEY) as client:
        raw = client.embeddings.with_raw_response.create(model="mini", input=TEXTS)
    assert (raw.headers["x-truncated-inputs"], bool(raw.headers["x-request-id"])) == ("1", True)
    assert_vectors([item.embedding for item in raw.parse().data], reference(*TEXTS))


@pytest.mark.parametrize("name", ["for-queries", "mini-query", "MINI-query:latest", "openai/mini-query"])
def test_names_with_a_prompt(clients: Service, reference: Reference, name: str) -> None:
    """A client that cannot send `input_type` chooses the prompt by the name of the model."""
    with openai.OpenAI(base_url=f"{clients.url}/v1", api_key=KEY) as client:
        response = client.embeddings.create(model=name, input=TEXTS[:3])
    assert response.model == name
    assert_vectors([item.embedding for item in response.data], reference(*TEXTS[:3], prompt=QUERY))


def test_aliases_share_one_model(clients: Service) -> None:
    """All aliases have the same state, and the model is in memory once."""
    assert list(clients.http.get("/ready").json()["models"]) == ["mini"]
    models = clients.http.get("/v1/models").json()["data"]
    assert [model["input_type"] for model in models] == [None, None, None, None, "query"]
    assert {model["state"] for model in models} == {"ready"}


def test_azure(clients: Service, reference: Reference) -> None:
    """Azure's client sends the key in `api-key`, and the model in the path."""
    with openai.AzureOpenAI(azure_endpoint=clients.url, api_key=KEY, api_version="2024-10-21") as client:
        response = client.embeddings.create(model="mini", input=TEXTS)
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="nope", input=TEXTS)
    assert_vectors([item.embedding for item in response.data], reference(*TEXTS))
    wrong = openai.AzureOpenAI(azure_endpoint=clients.url, api_key="sk-wrong", api_version="2024-10-21")
    with wrong, pytest.raises(openai.AuthenticationError):
        wrong.embeddings.create(model="mini", input=TEXTS)


def test_llama_index(clients: Service, reference: Reference) -> None:
    """OpenAILikeEmbedding returns the vectors of documents and queries."""
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    model = OpenAILikeEmbedding(model_name="mini", api_base=f"{clients.url}/v1", api_key=KEY)
    assert_vectors(model.get_text_embedding_batch(TEXTS[:3]), reference(*TEXTS[:3]))
    assert_vectors([model.get_query_embedding(TEXTS[0])], reference(TEXTS[0]))


def test_haystack(clients: Service, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedders of Haystack for OpenAI and Azure return the vectors of documents and queries."""
    monkeypatch.setenv("HAYSTACK_TELEMETRY_ENABLED", "False")
    from haystack import Document
    from haystack.components.embedders import AzureOpenAITextEmbedder, OpenAIDocumentEmbedder
    from haystack.utils import Secret

    key = Secret.from_token(KEY)
    documents = OpenAIDocumentEmbedder(api_key=key, model="mini", api_base_url=f"{clients.url}/v1")
    result = documents.run([Document(content=text) for text in TEXTS])
    assert_vectors([document.embedding for document in result["documents"]], reference(*TEXTS))
    text = AzureOpenAITextEmbedder(azure_endpoint=clients.url, azure_deployment="mini", api_key=key)
    assert_vectors([text.run(TEXTS[0])["embedding"]], reference(TEXTS[0]))
