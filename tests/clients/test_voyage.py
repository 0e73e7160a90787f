"""The SDK of Voyage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import voyageai

from tests.clients.helpers import DOCUMENT, IGNORE_WARNINGS, KEY, QUERY, TEXTS, Reference, assert_vectors

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
    """By value: integers by the range of the model, bits by the sign of the vectors of the reference."""
    vectors = reference(*TEXTS)[:, :dimension]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    model = clients.http.get("/v1/models/mini").json()
    value_range = model["output_types"]["int8_range"] * np.sqrt(model["dimensions"] / vectors.shape[1])
    expected = {
        "float": vectors,
        "int8": np.clip(np.rint(vectors * 127 / value_range), -127, 127),
        "uint8": np.clip(np.rint(vectors * 127 / value_range), -127, 127) + 128,
        "ubinary": np.packbits(vectors > 0, axis=1),
        "binary": np.packbits(vectors > 0, axis=1).astype(int) - 128,
    }
    for kind, values in expected.items():
        result = client(clients).embed(TEXTS, model="mini", output_dtype=kind, output_dimension=dimension)
        embeddings = np.array(result.embeddings)
        if kind == "float":
            assert_vectors(embeddings, vectors)
        elif kind in ("int8", "uint8"):
            # A value between two integers can be rounded to either, because the last bits of the floats differ.
            assert np.abs(embeddings - values).max() <= 1
            assert (embeddings == values).mean() > 0.99
        else:
            assert (embeddings == values).mean() > 0.98


async def test_asynchronous_client(clients: Service) -> None:
    """The asynchronous client gets the same integers."""
    asynchronous = voyageai.AsyncClient(api_key=KEY, base_url=f"{clients.url}/v1")  # type: ignore[attr-defined]
    result = await asynchronous.embed(TEXTS, model="mini", output_dtype="int8")
    assert result.embeddings == client(clients).embed(TEXTS, model="mini", output_dtype="int8").embeddings
