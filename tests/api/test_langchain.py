"""LangChain's OpenAIEmbeddings, as its users configure it."""

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

from tests.api.models import KEYS
from tests.service import BUNDLED, Service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

CL100K_FILE = "9b5ad71b2ce5302211f9c61530b329a4922fc6a4"
"""What tiktoken calls cl100k_base's vocabulary in its cache: the SHA-1 of its URL."""
TEXTS = ["hello world", "", "你好，世界"]


_made: list[OpenAIEmbeddings] = []


def embeddings(url: str, **options: Any) -> OpenAIEmbeddings:
    defaults = {"base_url": f"{url}/v1", "api_key": "unused", "model": BUNDLED, "max_retries": 0}
    made = OpenAIEmbeddings(**{**defaults, **options})
    _made.append(made)
    return made


def vectors(service: Service, texts: list[str]) -> Any:
    return [entry["embedding"] for entry in service.embed(texts).json()["data"]]


@pytest.fixture(autouse=True)
async def closed_connections() -> AsyncIterator[None]:
    """Close what LangChain leaves open: it has no method for that, and warnings are errors here."""
    yield
    while _made:
        made = _made.pop()
        made.client._client.close()
        await made.async_client._client.close()


def test_texts(service: Service) -> None:
    """With check_embedding_ctx_length=False, texts are sent, empty ones too, and answered."""
    client = embeddings(service.url, check_embedding_ctx_length=False)
    np.testing.assert_allclose(client.embed_documents(TEXTS), vectors(service, TEXTS), atol=1e-6)
    np.testing.assert_allclose(client.embed_query("hello world"), vectors(service, TEXTS)[0], atol=1e-6)


async def test_texts_asynchronously(service: Service) -> None:
    """The same without blocking."""
    client = embeddings(service.url, check_embedding_ctx_length=False)
    np.testing.assert_allclose(await client.aembed_documents(TEXTS), vectors(service, TEXTS), atol=1e-6)
    assert len(await client.aembed_query("hello")) == 384


def test_more_texts_than_one_of_its_requests(service: Service) -> None:
    """LangChain cuts long lists into requests; the answers come back in order."""
    texts = [f"text {number}" for number in range(70)]
    client = embeddings(service.url, check_embedding_ctx_length=False, chunk_size=30)
    np.testing.assert_allclose(client.embed_documents(texts), vectors(service, texts), atol=1e-5)


@pytest.fixture
def stand_in_encoding() -> Iterator[str]:
    """Yield the name of an encoding of single bytes: the real vocabulary cannot be fetched everywhere."""
    name = "stand-in-for-cl100k"
    ranks = {bytes([value]): value for value in range(256)}
    tiktoken_registry.ENCODINGS[name] = tiktoken.Encoding(
        name, pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens={}
    )
    yield name
    del tiktoken_registry.ENCODINGS[name]


def test_token_ids_are_refused_with_the_way_out(
    service: Service, stand_in_encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LangChain's default sends OpenAI's token ids: the error names both the client's and the server's setting."""
    monkeypatch.setattr(tiktoken, "encoding_for_model", lambda _: tiktoken.get_encoding(stand_in_encoding))
    client = embeddings(service.url, tiktoken_model_name="text-embedding-3-small")
    with pytest.raises(openai.BadRequestError) as refused:
        client.embed_documents(["hello world"])
    assert refused.value.code == "token_input_unsupported"
    assert "check_embedding_ctx_length=False" in refused.value.message
    assert "token_input" in refused.value.message


def test_cl100k_without_its_vocabulary_says_so(guarded: Service) -> None:
    """A model set to cl100k that has no vocabulary fails alone, and says what it lacks."""
    if _has_vocabulary():
        pytest.skip("the vocabulary is at hand")
    response = guarded.embed([[15339, 1917]], model="openai-ids")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "model_not_ready"
    assert "TIKTOKEN_CACHE_DIR" in response.json()["error"]["message"]
    assert guarded.embed("hello").status_code == 200


def test_cl100k_end_to_end(guarded: Service) -> None:
    """With token_input=cl100k, LangChain's default works and gives the vectors of the texts."""
    if not _has_vocabulary():
        pytest.skip(f"TIKTOKEN_CACHE_DIR holds no {CL100K_FILE}: the cl100k_base vocabulary is not at hand")
    client = embeddings(
        guarded.url, model="openai-ids", api_key=KEYS[0], tiktoken_model_name="text-embedding-3-small"
    )
    texts = ["hello world", "你好，世界 😀"]
    wanted = [entry["embedding"] for entry in guarded.embed(texts, model="mini").json()["data"]]
    np.testing.assert_allclose(client.embed_documents(texts), wanted, atol=1e-5)
    half_a_character = tiktoken.get_encoding("cl100k_base").encode("😀")[:1]
    refused = guarded.embed([half_a_character], model="openai-ids")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value")


def _has_vocabulary() -> bool:
    directory = os.environ.get("TIKTOKEN_CACHE_DIR") or os.environ.get("DATA_GYM_CACHE_DIR")
    return directory is not None and (Path(directory) / CL100K_FILE).is_file()
