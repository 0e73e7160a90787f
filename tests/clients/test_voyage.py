"""The SDK of Voyage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import voyageai

from tests.clients.helpers import (
    DOCUMENT,
    IGNORE_WARNINGS,
    KEY,
    QUERY,
    TEXTS,
    Reference,
    assert_types,
    assert_vectors,
    shortened,
)

if TYPE_CHECKING:
    from tests.service import Service

pytestmark = [pytest.mark.slow, IGNORE_WARNINGS]


def client(service: Service) -> Any:
    return voyageai.Client(api_key=KEY, base_url=f"{service.url}/v1", max_retries=0)  # type: ignore[attr-defined]


def test_vectors_and_prompts(clients: Service, reference: Reference) -> None:
    """The SDK asks for base64, and `input_type` chooses the prompt."""
    result = client(clients).embed(TEXTS, model="mini")
    assert_vectors(result.embeddings, reference(*TEXTS))
    assert result.total_tokens > 0
    for input_type, prompt in (("query", QUERY), ("document", DOCUMENT)):
        result = client(clients).embed(TEXTS, model="mini", input_type=input_type, truncation=True)
        assert_vectors(result.embeddings, reference(*TEXTS, prompt=prompt))


@pytest.mark.parametrize("dimension", [None, 64])
def test_all_types(clients: Service, reference: Reference, dimension: int | None) -> None:
    """Each type has the values that follow from the vectors of the reference."""
    embeddings = {
        kind: client(clients).embed(TEXTS, model="mini", output_dtype=kind, output_dimension=dimension).embeddings
        for kind in ("float", "int8", "uint8", "ubinary", "binary")
    }
    model = clients.http.get("/v1/models/mini").json()
    assert_types(embeddings, shortened(reference(*TEXTS), dimension), model)


async def test_asynchronous_client(clients: Service) -> None:
    """The asynchronous client gets the same integers."""
    asynchronous = voyageai.AsyncClient(api_key=KEY, base_url=f"{clients.url}/v1")  # type: ignore[attr-defined]
    result = await asynchronous.embed(TEXTS, model="mini", output_dtype="int8")
    assert result.embeddings == client(clients).embed(TEXTS, model="mini", output_dtype="int8").embeddings
