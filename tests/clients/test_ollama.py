"""Clients of Ollama: its SDK, LangChain and LlamaIndex."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ollama
import pytest

from tests.clients.helpers import IGNORE_WARNINGS, KEY, TEXTS, Reference, assert_vectors

if TYPE_CHECKING:
    from tests.service import Service

pytestmark = [pytest.mark.slow, IGNORE_WARNINGS]

HEADERS = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture
def client(clients: Service) -> ollama.Client:
    return ollama.Client(host=clients.url, headers=HEADERS)


@pytest.mark.parametrize("name", ["mini", "mini:latest", "nomic-embed-text:latest"])
def test_embed(client: ollama.Client, reference: Reference, name: str) -> None:
    """Vectors of several texts, under a name with and without a tag."""
    response = client.embed(model=name, input=TEXTS, keep_alive="5m", options={"num_ctx": 2048})
    assert response.model == name
    assert response.prompt_eval_count
    assert_vectors(response.embeddings, reference(*TEXTS))


def test_embed_options(client: ollama.Client, reference: Reference) -> None:
    """Truncated vectors are normalized, and a text that is too long is an error if the client forbids truncation."""
    vectors = reference(TEXTS[0])[:, :64]
    response = client.embed(model="mini", input=TEXTS[0], dimensions=64)
    assert_vectors(response.embeddings, vectors / ((vectors**2).sum() ** 0.5))
    with pytest.raises(ollama.ResponseError, match="maximum input length is 256 tokens"):
        client.embed(model="mini", input=TEXTS[3], truncate=False)


def test_older_route(client: ollama.Client, reference: Reference) -> None:
    """`embeddings` embeds one prompt."""
    assert_vectors([client.embeddings(model="mini", prompt=TEXTS[0]).embedding], reference(TEXTS[0]))


def test_models(client: ollama.Client) -> None:
    """The SDK parses the list and the description of models."""
    names = [model.model for model in client.list().models]
    assert names == ["mini", "text-embedding-3-small", "text-embedding-ada-002", "nomic-embed-text", "for-queries"]
    assert [model.model for model in client.ps().models] == ["mini"]
    shown = client.show("nomic-embed-text")
    assert shown.capabilities == ["embedding"]
    assert shown.modelinfo is not None
    assert shown.modelinfo["embedding.embedding_length"] == 384


def test_errors(client: ollama.Client, clients: Service) -> None:
    """The SDK shows the message and the status."""
    with pytest.raises(ollama.ResponseError, match="The model `nope` does not exist") as caught:
        client.embed(model="nope", input="x")
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="API key") as caught:
        ollama.Client(host=clients.url).embed(model="mini", input="x")
    assert caught.value.status_code == 401


async def test_asynchronous_client(clients: Service, reference: Reference) -> None:
    """The asynchronous client gets the same vectors."""
    client = ollama.AsyncClient(host=clients.url, headers=HEADERS)
    assert_vectors((await client.embed(model="mini", input=TEXTS)).embeddings, reference(*TEXTS))


async def test_langchain(clients: Service, reference: Reference) -> None:
    """OllamaEmbeddings finds the model, and embeds documents and queries."""
    from langchain_ollama import OllamaEmbeddings

    model = OllamaEmbeddings(
        model="mini", base_url=clients.url, client_kwargs={"headers": HEADERS}, validate_model_on_init=True
    )
    assert_vectors(model.embed_documents(TEXTS), reference(*TEXTS))
    assert_vectors([await model.aembed_query(TEXTS[0])], reference(TEXTS[0]))


def test_llama_index(clients: Service, reference: Reference) -> None:
    """OllamaEmbedding returns the vectors of documents and queries."""
    from llama_index.embeddings.ollama import OllamaEmbedding

    model = OllamaEmbedding(model_name="mini", base_url=clients.url, client_kwargs={"headers": HEADERS})
    assert_vectors(model.get_text_embedding_batch(TEXTS[:3]), reference(*TEXTS[:3]))
    assert_vectors([model.get_query_embedding(TEXTS[0])], reference(TEXTS[0]))
