"""LangChain's OpenAIEmbeddings with the configurations of its users."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import openai
import pytest
from langchain_openai import OpenAIEmbeddings

from tests.api.helpers import KEYS
from tests.service import BUNDLED, Service

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tiktoken import Encoding

TEXTS = ["hello world", "", "你好，世界 😀"]

_clients: list[OpenAIEmbeddings] = []


def embeddings(service: Service, **options: Any) -> OpenAIEmbeddings:
    defaults = {"base_url": f"{service.url}/v1", "api_key": "unused", "model": BUNDLED, "max_retries": 0}
    client = OpenAIEmbeddings(**{**defaults, **options})
    _clients.append(client)
    return client


def vectors(service: Service, texts: list[str], **fields: str) -> Any:
    return [entry["embedding"] for entry in service.embed(texts, **fields).json()["data"]]


@pytest.fixture(autouse=True)
async def closed_connections(tiktoken_cl100k: Encoding) -> AsyncIterator[None]:
    """Close the connections of LangChain, which has no method for it, because warnings are errors in tests."""
    yield
    while _clients:
        embeddings = _clients.pop()
        embeddings.client._client.close()
        await embeddings.async_client._client.close()


@pytest.mark.parametrize("sends_token_ids", [True, False])
def test_texts(service: Service, sends_token_ids: bool) -> None:
    """Whether LangChain sends token ids of OpenAI, as it does by default, or texts, also empty ones."""
    client = embeddings(service, check_embedding_ctx_length=sends_token_ids)
    expected = vectors(service, TEXTS)
    np.testing.assert_allclose(client.embed_documents(TEXTS), expected, atol=1e-6)
    np.testing.assert_allclose(client.embed_query(TEXTS[0]), expected[0], atol=1e-6)


async def test_texts_asynchronously(service: Service) -> None:
    """The asynchronous methods return the same vectors."""
    client = embeddings(service)
    np.testing.assert_allclose(await client.aembed_documents(TEXTS), vectors(service, TEXTS), atol=1e-6)
    assert len(await client.aembed_query("hello")) == 384


def test_more_texts_than_in_one_request(service: Service) -> None:
    """LangChain splits long lists into several requests, and the vectors are in order."""
    texts = [f"text {number}" for number in range(70)]
    client = embeddings(service, chunk_size=30)
    np.testing.assert_allclose(client.embed_documents(texts), vectors(service, texts), atol=1e-5)


def test_parts_of_a_long_text(service: Service, tiktoken_cl100k: Encoding) -> None:
    """LangChain splits long texts between tokens, also inside a character, and averages the vectors of the parts."""
    text = "龘 and 😀 and 𠮷, " * 3
    ids = tiktoken_cl100k.encode(text)
    parts = [tiktoken_cl100k.decode_bytes(ids[start : start + 5]) for start in range(0, len(ids), 5)]
    assert any(b"\xef\xbf\xbd" in part.decode(errors="replace").encode() for part in parts)
    weights = [min(5, len(ids) - start) for start in range(0, len(ids), 5)]
    of_parts = vectors(service, [part.decode(errors="ignore") for part in parts])
    average = np.average(of_parts, axis=0, weights=weights)
    (vector,) = embeddings(service, embedding_ctx_length=5).embed_documents([text])
    np.testing.assert_allclose(vector, average / np.linalg.norm(average), atol=1e-5)


def test_token_ids_are_rejected_with_a_remedy(guarded: Service) -> None:
    """With `token_input: reject`, the error names the option of LangChain and the setting of the model."""
    client = embeddings(guarded, model="no-ids", api_key=KEYS[0])
    with pytest.raises(openai.BadRequestError) as rejected:
        client.embed_documents(["hello world"])
    assert rejected.value.code == "token_input_unsupported"
    assert "check_embedding_ctx_length=False" in rejected.value.message
    assert "token_input" in rejected.value.message


def test_cl100k(guarded: Service) -> None:
    """With `token_input: cl100k`, also ids that look like those of the model are decoded."""
    client = embeddings(guarded, model="openai-ids", api_key=KEYS[0])
    texts = ["hello world", "你好，世界 😀"]
    np.testing.assert_allclose(client.embed_documents(texts), vectors(guarded, texts, model="mini"), atol=1e-5)
