"""LangChain's OpenAIEmbeddings with the configurations of its users."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pytest
import tiktoken
from langchain_openai import OpenAIEmbeddings
from tiktoken import registry as tiktoken_registry

from tests.api.helpers import KEYS
from tests.service import BUNDLED, Service, assert_error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

CL100K_FILE = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
"""Name of the vocabulary of cl100k_base in the cache of tiktoken: the SHA-1 of its URL."""
TEXTS = ["hello world", "", "你好，世界"]

_clients: list[OpenAIEmbeddings] = []


def embeddings(url: str, **options: Any) -> OpenAIEmbeddings:
    defaults = {"base_url": f"{url}/v1", "api_key": "unused", "model": BUNDLED, "max_retries": 0}
    client = OpenAIEmbeddings(**{**defaults, **options})
    _clients.append(client)
    return client


def vectors(service: Service, texts: list[str]) -> Any:
    return [entry["embedding"] for entry in service.embed(texts).json()["data"]]


@pytest.fixture(autouse=True)
async def closed_connections() -> AsyncIterator[None]:
    """Close the connections of LangChain, which has no method for it, because warnings are errors in tests."""
    yield
    while _clients:
        embeddings = _clients.pop()
        embeddings.client._client.close()
        await embeddings.async_client._client.close()


def test_texts(service: Service) -> None:
    """With check_embedding_ctx_length=False, texts are sent, also empty ones, and answered."""
    client = embeddings(service.url, check_embedding_ctx_length=False)
    np.testing.assert_allclose(client.embed_documents(TEXTS), vectors(service, TEXTS), atol=1e-6)
    np.testing.assert_allclose(client.embed_query("hello world"), vectors(service, TEXTS)[0], atol=1e-6)


async def test_texts_asynchronously(service: Service) -> None:
    """The asynchronous methods return the same vectors."""
    client = embeddings(service.url, check_embedding_ctx_length=False)
    np.testing.assert_allclose(await client.aembed_documents(TEXTS), vectors(service, TEXTS), atol=1e-6)
    assert len(await client.aembed_query("hello")) == 384


def test_more_texts_than_in_one_request(service: Service) -> None:
    """LangChain splits long lists into several requests, and the vectors are in order."""
    texts = [f"text {number}" for number in range(70)]
    client = embeddings(service.url, check_embedding_ctx_length=False, chunk_size=30)
    np.testing.assert_allclose(client.embed_documents(texts), vectors(service, texts), atol=1e-5)


@pytest.fixture
def stand_in_encoding() -> Iterator[str]:
    """Yield the name of an encoding of single bytes, because the real vocabulary is not available everywhere."""
    name = "stand-in-for-cl100k"
    ranks = {bytes([value]): value for value in range(256)}
    tiktoken_registry.ENCODINGS[name] = tiktoken.Encoding(
        name, pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={}
    )
    yield name
    del tiktoken_registry.ENCODINGS[name]


def test_token_ids_are_rejected_with_a_remedy(
    service: Service, stand_in_encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LangChain sends OpenAI's token ids by default. The error names the option of LangChain and the setting of the model."""
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda _: tiktoken.get_encoding(stand_in_encoding))
    client = embeddings(service.url, tiktoken_model_name="text-embedding-3-small")
    with pytest.raises(openai.BadRequestError) as rejected:
        client.embed_documents(["hello world"])
    assert rejected.value.code == "token_input_unsupported"
    assert "check_embedding_ctx_length=False" in rejected.value.message
    assert "token_input" in rejected.value.message


def test_cl100k_without_its_vocabulary(guarded: Service) -> None:
    """A model with token_input=cl100k fails alone if the vocabulary is missing, and the error says what is missing."""
    if _has_vocabulary():
        pytest.skip("the vocabulary is available")
    response = guarded.embed([[15339, 1917]], model="openai-ids")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "model_not_ready"
    assert "TIKTOKEN_CACHE_DIR" in response.json()["error"]["message"]
    assert guarded.embed("hello").status_code == 200


def test_cl100k(guarded: Service) -> None:
    """With token_input=cl100k, LangChain's default returns the vectors of the texts."""
    if not _has_vocabulary():
        pytest.skip(f"the vocabulary of cl100k_base is not available: {CL100K_FILE} in TIKTOKEN_CACHE_DIR")
    client = embeddings(guarded.url, model="openai-ids", api_key=KEYS[0], tiktoken_model_name="text-embedding-3-small")
    texts = ["hello world", "你好，世界 😀"]
    expected = [entry["embedding"] for entry in guarded.embed(texts, model="mini").json()["data"]]
    np.testing.assert_allclose(client.embed_documents(texts), expected, atol=1e-5)
    incomplete = tiktoken.get_encoding("cl100k_base").encode("😀")[:1]
    response = guarded.embed([incomplete], model="openai-ids")
    assert_error(response, 400, "invalid_value", param="input")


def _has_vocabulary() -> bool:
    directory = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    return directory is not None and (Path(directory) / CL100K_FILE).is_file()
