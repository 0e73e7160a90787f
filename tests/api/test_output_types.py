"""Types of the values of vectors, as the APIs of Voyage, Jina, Cohere and vLLM request them."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.service import BUNDLED, assert_error

if TYPE_CHECKING:
    from tests.service import Service

TEXTS = ["hello", "How do I reset my password?", "今天天气很好，我们去公园散步。", "word " * 90]
FIELDS = ("output_dtype", "embedding_type", "embedding_types", "encoding_dtype", "embed_dtype")
DTYPES = {"float": "<f4", "float16": "<f2", "int8": "i1", "uint8": "u1", "binary": "i1", "ubinary": "u1"}


def embed(service: Service, *texts: str, **fields: Any) -> list[Any]:
    response = service.http.post("/v1/embeddings", json={"input": list(texts), **fields})
    assert response.status_code == 200, response.text
    return [item["embedding"] for item in response.json()["data"]]


@pytest.fixture
def floats(service: Service) -> np.ndarray:
    return np.array(embed(service, *TEXTS), dtype=np.float32)


def test_integers_are_scaled_by_the_range_of_the_model(service: Service, floats: np.ndarray) -> None:
    """The range is in the description of the model. uint8 is int8 plus 128."""
    value_range = service.http.get(f"/v1/models/{BUNDLED}").json()["output_types"]["int8_range"]
    expected = np.clip(np.rint(floats * np.float32(127 / value_range)), -127, 127).astype(int)
    assert embed(service, *TEXTS, output_dtype="int8") == expected.tolist()
    assert embed(service, *TEXTS, output_dtype="uint8") == (expected + 128).tolist()
    cosines = (expected * floats).sum(axis=1) / np.linalg.norm(expected, axis=1) / np.linalg.norm(floats, axis=1)
    assert cosines.min() > 0.999


def test_bits_are_the_signs(service: Service, floats: np.ndarray) -> None:
    """Eight in each byte, the first of which is the most significant. `binary` is `ubinary` minus 128."""
    bits = np.packbits(floats > 0, axis=1).astype(int)
    assert embed(service, *TEXTS, output_dtype="ubinary") == bits.tolist()
    assert embed(service, *TEXTS, output_dtype="binary") == (bits - 128).tolist()


@pytest.mark.parametrize("kind", DTYPES)
def test_base64_has_the_bytes_of_the_values(service: Service, kind: str) -> None:
    numbers = embed(service, *TEXTS, output_dtype=kind)
    encoded = embed(service, *TEXTS, output_dtype=kind, encoding_format="base64")
    for values, text in zip(numbers, encoded, strict=True):
        decoded = np.frombuffer(base64.b64decode(text, validate=True), dtype=DTYPES[kind])
        assert np.array_equal(np.array(values, dtype=DTYPES[kind]), decoded)


@pytest.mark.parametrize("kind", ["int8", "binary"])
def test_bytes_do_not_depend_on_the_other_texts(service: Service, kind: str) -> None:
    """The range is that of the model, not that of the request."""
    together = embed(service, *TEXTS, output_dtype=kind)
    assert [embed(service, text, output_dtype=kind)[0] for text in TEXTS] == together


@pytest.mark.parametrize("field", FIELDS)
def test_all_names_of_the_field(service: Service, field: str) -> None:
    """The case does not matter, and an array may have one type."""
    expected = embed(service, "hello", output_dtype="int8")
    for value in ("int8", "INT8", ["int8"]):
        assert embed(service, "hello", **{field: value}) == expected


def test_other_names_of_the_types(service: Service) -> None:
    """float32 is float, and Jina's base64 is an encoding of it."""
    plain = embed(service, "hello")
    assert embed(service, "hello", embed_dtype="float32") == plain
    assert embed(service, "hello", embedding_type="base64") == embed(service, "hello", encoding_format="base64")
    int8 = embed(service, "hello", output_dtype="int8", encoding_format="base64")
    assert embed(service, "hello", embedding_type=["int8", "base64"]) == int8


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"output_dtype": "int4"}, "invalid_value", "output_dtype"),
        ({"embedding_type": 5}, "invalid_type", "embedding_type"),
        ({"embedding_types": []}, "invalid_type", "embedding_types"),
        ({"embedding_types": ["float", "int8"]}, "invalid_value", "embedding_types"),
        ({"embedding_types": ["sparse"]}, "unsupported_task", "model"),
        ({"output_dtype": "int8", "embedding_type": "binary"}, "invalid_value", "embedding_type"),
    ],
)
def test_invalid_types(service: Service, fields: dict[str, Any], code: str, param: str) -> None:
    """The error names the field."""
    assert_error(service.embed("hello", **fields), 400, code, param=param)


def test_smaller_vectors_have_a_range_of_their_own(guarded: Service) -> None:
    """They are normalized again, which makes their values larger."""
    floats = np.array(embed(guarded, "hello", model="mini", dimensions=96))
    integers = np.array(embed(guarded, "hello", model="mini", dimensions=96, output_dtype="int8"))
    value_range = guarded.http.get("/v1/models/mini").json()["output_types"]["int8_range_normalized"] * 2
    assert np.array_equal(integers, np.clip(np.rint(floats * 127 / value_range), -127, 127))


def test_the_cost_in_neighbors_is_shown(service: Service) -> None:
    kept = service.http.get(f"/v1/models/{BUNDLED}").json()["output_types"]["top10_overlap"]
    assert set(kept) == set(DTYPES) - {"float"}
    assert kept["float16"] > 0.99
    assert kept["int8"] > 0.98
    assert 0.6 < kept["binary"] == kept["ubinary"] < 0.8


def test_objects_with_texts(service: Service) -> None:
    """Jina's form of inputs."""
    assert embed(service, *TEXTS) == [
        item["embedding"] for item in service.embed(*({"text": text} for text in TEXTS)).json()["data"]
    ]
    for wrong in ({"image": "x"}, {"text": 1}, {"text": "a", "image": "x"}, {}):
        assert_error(service.embed(wrong, {"text": "a"}), 400, "invalid_input", param="input", phrase='{"text": "..."}')
