"""The numbers in an answer are the model's own."""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from tests.api.models import cosines

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
    """Return the vectors of a float answer, in the order of the inputs."""
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [entry["index"] for entry in data] == list(range(len(data)))
    return np.array([entry["embedding"] for entry in data], dtype=np.float32)


def decoded(text: str) -> NDArray[np.float32]:
    """Return the vector in a base64 answer, as the SDKs read it."""
    return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4")


def encode(reference: SentenceTransformer, texts: Sequence[str]) -> NDArray[np.float32]:
    result: Any = reference.encode(list(texts), batch_size=1)
    return np.asarray(result)


def test_vectors_are_those_of_sentence_transformers(guarded: Service, reference: SentenceTransformer) -> None:
    """In fp32, direction and length are the reference's, for each text of a mixed batch."""
    texts = [text for text in TEXTS if text]
    given, wanted = vectors(guarded.embed(texts, model="mini")), encode(reference, texts)
    assert given.shape == (len(texts), 384)
    assert cosines(given, wanted).min() >= 0.99999
    np.testing.assert_allclose(np.linalg.norm(given, axis=1), np.linalg.norm(wanted, axis=1), atol=1e-5)


def test_default_precision_is_as_good_as_it_says(service: Service, reference: SentenceTransformer) -> None:
    """The precision that is chosen for this machine stays within 0.9999 of the reference."""
    given, wanted = vectors(service.embed(TEXTS)), encode(reference, TEXTS)
    assert cosines(given, wanted).min() >= 0.9999
    np.testing.assert_allclose(np.linalg.norm(given, axis=1), np.linalg.norm(wanted, axis=1), atol=1e-5)


def test_base64_carries_the_very_floats(service: Service) -> None:
    """base64 is padded standard base64 of little-endian float32, equal to the float form bit for bit."""
    floats = vectors(service.embed(TEXTS[:1]))
    answer = service.embed(TEXTS[:1], encoding_format="base64").json()["data"][0]["embedding"]
    assert isinstance(answer, str)
    assert len(answer) % 4 == 0
    np.testing.assert_array_equal(decoded(answer), floats[0])


def test_order_is_that_of_the_inputs(service: Service) -> None:
    """Inputs of all lengths, which are batched by length, come back in their own order."""
    texts = [f"text {number} " + "word " * (number * 37 % 60) for number in range(100)]
    together = vectors(service.embed(texts))
    for index in (0, 1, 50, 99):
        alone = vectors(service.embed(texts[index]))
        assert cosines(together[index : index + 1], alone).min() >= 0.9999


def test_normalize_false_gives_the_raw_length(guarded: Service, reference: SentenceTransformer) -> None:
    """`normalize` (or `normalized`) false leaves a vector at the length that pooling gave it."""
    given = vectors(guarded.embed(TEXTS[1], model="mini", normalize=False))
    np.testing.assert_array_equal(given, vectors(guarded.embed(TEXTS[1], model="mini", normalized=False)))
    tokens = reference.preprocess(TEXTS[1:2])
    raw = reference[1](reference[0](tokens))["sentence_embedding"].detach().numpy()
    np.testing.assert_allclose(given, raw, atol=1e-4)
    assert abs(np.linalg.norm(raw) - 1) > 0.1


def test_fewer_dimensions_are_cut_and_brought_back_to_length_1(guarded: Service) -> None:
    """A smaller size is the start of the whole vector, at length 1."""
    whole = vectors(guarded.embed(TEXTS[1], model="mini"))
    for name in ("dimensions", "output_dimension"):
        cut = vectors(guarded.embed(TEXTS[1], model="mini", **{name: 100}))
        assert cut.shape == (1, 100)
        wanted = whole[:, :100] / np.linalg.norm(whole[:, :100])
        np.testing.assert_allclose(cut, wanted, atol=1e-6)


def test_fewer_dimensions_have_length_1_even_without_normalization(guarded: Service) -> None:
    """Cutting brings a vector back to length 1 whatever `normalize` says."""
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
def test_input_type_puts_the_prompt_before_the_text(
    guarded: Service, reference: SentenceTransformer, input_type: str | None, prompt: str
) -> None:
    """A kind of input, under any API's name for it, is the model's own prompt for it."""
    given = vectors(guarded.embed("cats and dogs", model="mini", input_type=input_type))
    assert cosines(given, encode(reference, [f"{prompt}cats and dogs"])).min() >= 0.99999


@pytest.mark.parametrize("field", ["input_type", "task", "prompt_name"])
def test_input_type_has_three_names(guarded: Service, field: str) -> None:
    """Whichever field carries it, the prompt changes the vector in the same way."""
    plain = vectors(guarded.embed("cats", model="mini"))
    asked = vectors(guarded.embed("cats", model="mini", **{field: "query"}))
    assert cosines(plain, asked).max() < 0.999
    np.testing.assert_allclose(asked, vectors(guarded.embed("query: cats", model="mini")), atol=1e-6)


def test_two_precisions_are_served_side_by_side(guarded: Service) -> None:
    """Aliases of one model with different precisions give nearly, not exactly, the same vectors."""
    exact = vectors(guarded.embed(TEXTS[1], model="mini"))
    half = vectors(guarded.embed(TEXTS[1], model="half"))
    closeness = cosines(exact, half).min()
    assert 0.99 < closeness < 0.9999999
    precisions = {entry["id"]: entry["precision"] for entry in guarded.http.get("/v1/models").json()["data"]}
    assert (precisions["mini"], precisions["half"]) == ("fp32", "bf16")


def test_truncation_is_that_of_sentence_transformers(
    guarded: Service, reference: SentenceTransformer
) -> None:
    """A text that is too long is cut where the reference cuts it; START keeps the other end."""
    long = "first things come first " + "word " * 400 + "the end is near"
    given = vectors(guarded.embed(long, model="mini"))
    assert cosines(given, encode(reference, [long])).min() >= 0.99999
    from_start = vectors(guarded.embed(long, model="mini", truncate="START"))
    assert cosines(from_start, encode(reference, ["word " * 250 + "the end is near"])).min() >= 0.99999
    assert cosines(given, from_start).max() < 0.999


def test_own_token_ids_are_taken_as_they_are(guarded: Service, reference: SentenceTransformer) -> None:
    """Where the model's own ids are allowed, the ids of a text, special tokens included, give its vector."""
    rows = [reference.tokenizer(text)["input_ids"] for text in ("cats", "dogs and cats")]
    given = vectors(guarded.embed(rows, model="team/own-ids"))
    assert cosines(given, encode(reference, ["cats", "dogs and cats"])).min() >= 0.99999
    one = vectors(guarded.embed(rows[1], model="team/own-ids"))
    np.testing.assert_allclose(one, given[1:], atol=1e-5)
