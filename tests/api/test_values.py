"""The vectors in responses are those of the model."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.api.helpers import cosines, load

if TYPE_CHECKING:
    from collections.abc import Sequence

    import httpx
    from numpy.typing import NDArray
    from sentence_transformers import SentenceTransformer

    from tests.service import Service

TEXTS = [
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "今天天气很好，我们去公园散步。",
    "How do I reset my password? 😀",
    "",
    "Embedding models turn text into vectors that can be compared. " * 60,
    "x" * 3000,
    "nul\0inside\ttab\nnewline",
]


def vectors(response: httpx.Response) -> NDArray[np.float32]:
    """Return the vectors of a response in the float format, in the order of the inputs."""
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return np.array([entry["embedding"] for entry in data], dtype=np.float32)


def decode(text: str) -> NDArray[np.float32]:
    """Return the vector of a response in the base64 format, decoded as by the SDKs."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")


def encode(reference: SentenceTransformer, texts: Sequence[str]) -> NDArray[np.float32]:
    result: Any = reference.encode(list(texts), batch_size=1)
    return np.asarray(result)


def test_vectors_equal_sentence_transformers(guarded: Service, reference: SentenceTransformer) -> None:
    """In fp32, each text of a mixed batch has the direction and the length of the reference."""
    texts = [text for text in TEXTS if text]
    returned, expected = vectors(guarded.embed(texts, model="mini")), encode(reference, texts)
    assert returned.shape == (len(texts), 384)
    assert cosines(returned, expected).min() >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(returned, axis=1), np.linalg.norm(expected, axis=1), atol=1e-5)


def test_default_precision(service: Service, reference: SentenceTransformer) -> None:
    """The precision that is chosen for this machine is within 0.9999 of the reference."""
    returned, expected = vectors(service.embed(TEXTS)), encode(reference, TEXTS)
    assert cosines(returned, expected).min() >= 0.9999
    np.testing.assert_allclose(np.linalg.norm(returned, axis=1), np.linalg.norm(expected, axis=1), atol=1e-5)


def test_base64_equals_the_floats(service: Service) -> None:
    """base64 is padded standard base64 of little-endian float32, with the same bits as the float format."""
    floats = vectors(service.embed(TEXTS[:1]))
    answer = service.embed(TEXTS[:1], encoding_format="base64").json()["data"][0]["embedding"]
    assert isinstance(answer, str)
    assert len(answer) % 4 == 0
    np.testing.assert_array_equal(decode(answer), floats[0])


def test_order_of_the_inputs(service: Service) -> None:
    """Inputs of different lengths, which are batched by length, are returned in their order."""
    texts = [f"text {number} " + "word " * (number * 37 % 60) for number in range(100)]
    together = vectors(service.embed(texts))
    for index in (0, 1, 50, 99):
        alone = vectors(service.embed(texts[index]))
        assert cosines(together[index : index + 1], alone).min() >= 0.9999


def test_normalize_false(guarded: Service, reference: SentenceTransformer) -> None:
    """With `normalize` (or `normalized`) false, a vector has the length that pooling returns."""
    returned = vectors(guarded.embed(TEXTS[1], model="mini", normalize=False))
    np.testing.assert_array_equal(returned, vectors(guarded.embed(TEXTS[1], model="mini", normalized=False)))
    tokens = reference.preprocess(TEXTS[1:2])
    raw = reference[1](reference[0](tokens))["sentence_embedding"].detach().numpy()
    np.testing.assert_allclose(returned, raw, atol=1e-4)
    assert abs(np.linalg.norm(raw) - 1) > 0.1


def test_dimensions(guarded: Service) -> None:
    """A smaller size is the start of the full vector, normalized to length 1."""
    whole = vectors(guarded.embed(TEXTS[1], model="mini"))
    for name in ("dimensions", "output_dimension"):
        cut = vectors(guarded.embed(TEXTS[1], model="mini", **{name: 100}))
        assert cut.shape == (1, 100)
        expected = whole[:, :100] / np.linalg.norm(whole[:, :100])
        np.testing.assert_allclose(cut, expected, atol=1e-6)


def test_dimensions_without_normalization(guarded: Service) -> None:
    """Truncated vectors are normalized whatever `normalize` says."""
    cut = vectors(guarded.embed(TEXTS[1], model="mini", dimensions=10, normalize=False))
    np.testing.assert_allclose(np.linalg.norm(cut), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("input_type", "prompt"),
    [
        (None, ""),
        ("query", "query: "),
        ("search_query", "query: "),
        ("retrieval.query", "query: "),
        ("document", "passage: "),
        ("passage", "passage: "),
        ("search_document", "passage: "),
        ("retrieval.passage", "passage: "),
    ],
)
def test_input_type_adds_the_prompt(
    guarded: Service, reference: SentenceTransformer, input_type: str | None, prompt: str
) -> None:
    """An input type, under any API's name for it, adds the model's own prompt."""
    returned = vectors(guarded.embed("cats and dogs", model="mini", input_type=input_type))
    assert cosines(returned, encode(reference, [f"{prompt}cats and dogs"])).min() >= 0.99999


@pytest.mark.parametrize("field", ["input_type", "task", "prompt_name"])
def test_names_of_input_type(guarded: Service, field: str) -> None:
    """Each name of the field adds the same prompt."""
    plain = vectors(guarded.embed("cats", model="mini"))
    prompted = vectors(guarded.embed("cats", model="mini", **{field: "query"}))
    assert cosines(plain, prompted).max() < 0.999
    np.testing.assert_allclose(prompted, vectors(guarded.embed("query: cats", model="mini")), atol=1e-6)


@pytest.mark.slow  # on many processors, torch takes minutes to measure bf16
def test_two_precisions(guarded: Service) -> None:
    """Aliases of one model with different precisions return nearly, not exactly, the same vectors."""
    loaded = load(guarded, "half")
    assert (loaded.status_code, loaded.json()["precision"]) == (200, "bf16")
    exact = vectors(guarded.embed(TEXTS[1], model="mini"))
    half = vectors(guarded.embed(TEXTS[1], model="half"))
    assert 0.99 < cosines(exact, half).min() < 0.9999999
    precisions = {model["id"]: model["precision"] for model in guarded.http.get("/v1/models").json()["data"]}
    assert (precisions["mini"], precisions["half"]) == ("fp32", "bf16")


def test_truncation(guarded: Service, reference: SentenceTransformer) -> None:
    """A text that is too long is truncated like by the reference; START keeps its end."""
    long = "first things come first " + "word " * 400 + "the end is near"
    returned = vectors(guarded.embed(long, model="mini"))
    assert cosines(returned, encode(reference, [long])).min() >= 0.99999
    from_start = vectors(guarded.embed(long, model="mini", truncate="START"))
    assert cosines(from_start, encode(reference, ["word " * 250 + "the end is near"])).min() >= 0.99999
    assert cosines(returned, from_start).max() < 0.999


def test_token_ids(guarded: Service, reference: SentenceTransformer) -> None:
    """With token_input=model, the ids of a text, special tokens included, return its vector."""
    rows = [reference.tokenizer(text)["input_ids"] for text in ("cats", "dogs and cats")]
    returned = vectors(guarded.embed(rows, model="team/own-ids"))
    assert cosines(returned, encode(reference, ["cats", "dogs and cats"])).min() >= 0.99999
    one = vectors(guarded.embed(rows[1], model="team/own-ids"))
    np.testing.assert_allclose(one, returned[1:], atol=1e-5)
