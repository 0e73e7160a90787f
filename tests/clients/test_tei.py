"""Clients of text-embeddings-inference: those of huggingface_hub and LlamaIndex."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError

from tests.clients.helpers import IGNORE_WARNINGS, KEY, QUERY, TEXTS, Reference, assert_vectors

if TYPE_CHECKING:
    from tests.service import Service

pytestmark = [pytest.mark.slow, IGNORE_WARNINGS]


def test_inference_client(clients: Service, reference: Reference) -> None:
    """The client posts to the root, and gets vectors or similarities."""
    client = InferenceClient(base_url=clients.url, api_key=KEY)
    assert_vectors(client.feature_extraction(TEXTS[0]), reference(TEXTS[0]))
    prompted = client.feature_extraction(TEXTS[0], prompt_name="query", normalize=True, truncate=True)
    assert_vectors(prompted, reference(TEXTS[0], prompt=QUERY))
    vectors = reference(*TEXTS)
    assert_vectors(client.sentence_similarity(TEXTS[0], other_sentences=TEXTS[1:]), vectors[1:] @ vectors[0])


def test_path_of_the_route(clients: Service, reference: Reference) -> None:
    """The URL of the route itself works, too."""
    client = InferenceClient(model=f"{clients.url}/embed", token=KEY)
    assert_vectors(client.feature_extraction(TEXTS[0]), reference(TEXTS[0]))


def test_errors(clients: Service) -> None:
    """The client shows the message."""
    with pytest.raises(HfHubHTTPError, match="maximum input length is 256 tokens"):
        InferenceClient(base_url=clients.url, api_key=KEY).feature_extraction(TEXTS[3], truncate=False)
    with pytest.raises(HfHubHTTPError, match="Incorrect API key"):
        InferenceClient(base_url=clients.url, api_key="x").feature_extraction(TEXTS[0])


async def test_llama_index(clients: Service, reference: Reference) -> None:
    """TextEmbeddingsInference returns the vectors of documents and queries."""
    from llama_index.embeddings.text_embeddings_inference import TextEmbeddingsInference

    model = TextEmbeddingsInference(model_name="mini", base_url=clients.url, auth_token=KEY, timeout=60)
    assert_vectors(model.get_text_embedding_batch(TEXTS), reference(*TEXTS))
    assert_vectors([await model.aget_query_embedding(TEXTS[0])], reference(TEXTS[0]))
