"""The SDK of Cohere, versions 1 and 2 of its API."""

from __future__ import annotations

from typing import TYPE_CHECKING

import cohere
import pytest

from tests.clients.helpers import DOCUMENT, IGNORE_WARNINGS, KEY, QUERY, TEXTS, Reference, assert_types, assert_vectors

if TYPE_CHECKING:
    from tests.service import Service

pytestmark = [pytest.mark.slow, IGNORE_WARNINGS]


@pytest.mark.parametrize("path", ["", "/v1"])
def test_version_1(clients: Service, reference: Reference, path: str) -> None:
    """The SDK sends 96 texts at a time, and merges the responses."""
    texts = [*TEXTS, *(f"text {number}" for number in range(120))]
    client = cohere.Client(api_key=KEY, base_url=f"{clients.url}{path}")
    response = client.embed(model="mini", texts=texts, input_type="search_document")
    assert response.response_type == "embeddings_floats"
    assert_vectors(response.embeddings, reference(*texts, prompt=DOCUMENT))
    by_type = client.embed(model="mini", texts=TEXTS, input_type="search_query", embedding_types=["float"])
    assert by_type.response_type == "embeddings_by_type"
    assert_vectors(by_type.embeddings.float_, reference(*TEXTS, prompt=QUERY))


def test_version_2(clients: Service, reference: Reference) -> None:
    """`input_type` chooses the prompt."""
    client = cohere.ClientV2(api_key=KEY, base_url=clients.url)
    response = client.embed(model="mini", texts=TEXTS, input_type="search_query", embedding_types=["float"])
    assert_vectors(response.embeddings.float_, reference(*TEXTS, prompt=QUERY))
    assert response.texts == TEXTS
    assert response.meta is not None
    assert response.meta.billed_units is not None
    assert response.meta.billed_units.input_tokens


def test_types(clients: Service, reference: Reference) -> None:
    """Each type has the values that follow from the vectors of the reference."""
    client = cohere.ClientV2(api_key=KEY, base_url=clients.url)
    types = ["float", "int8", "uint8", "binary", "ubinary"]
    embeddings = client.embed(model="mini", texts=TEXTS, input_type="search_query", embedding_types=types).embeddings
    by_type = {"float": embeddings.float_} | {kind: getattr(embeddings, kind) for kind in types[1:]}
    assert_types(by_type, reference(*TEXTS, prompt=QUERY), clients.http.get("/v1/models/mini").json())


async def test_asynchronous_client(clients: Service, reference: Reference) -> None:
    """The asynchronous client gets the same vectors."""
    client = cohere.AsyncClientV2(api_key=KEY, base_url=clients.url)
    response = await client.embed(model="mini", texts=TEXTS, input_type="search_document", embedding_types=["float"])
    assert_vectors(response.embeddings.float_, reference(*TEXTS, prompt=DOCUMENT))


def test_errors(clients: Service) -> None:
    """The SDK raises the error of the status, with the message."""
    client = cohere.ClientV2(api_key=KEY, base_url=clients.url)
    with pytest.raises(cohere.NotFoundError, match="The model `nope` does not exist"):
        client.embed(model="nope", texts=["x"], input_type="search_query", embedding_types=["float"])
    with pytest.raises(cohere.UnauthorizedError, match="Incorrect API key"):
        cohere.ClientV2(api_key="x", base_url=clients.url).embed(
            model="mini", texts=["x"], input_type="search_query", embedding_types=["float"]
        )
