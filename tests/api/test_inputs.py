"""What may be embedded, how much of it, and what is refused."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest

from tests.service import assert_error

if TYPE_CHECKING:
    from tests.service import Service


@pytest.mark.parametrize("given", ["", [""], ["", "x", ""], " ", "\n\t"])
def test_empty_text_has_a_vector(service: Service, given: Any) -> None:
    """LangChain sends empty strings: they are texts like any other."""
    response = service.embed(given)
    assert response.status_code == 200
    assert len(response.json()["data"]) == (len(given) if isinstance(given, list) else 1)
    assert response.json()["usage"]["prompt_tokens"] >= 2


@pytest.mark.parametrize("given", ["", [""], ["x", ""]])
def test_strict_mode_refuses_empty_text(guarded: Service, given: Any) -> None:
    """EMB_PROVIDER_STRICT_INPUT=true answers as api.openai.com does."""
    assert_error(guarded.embed(given), 400, "invalid_input", param="input", phrase="'$.input' is invalid")
    assert guarded.embed(" ").status_code == 200


def test_2048_inputs_in_one_request(service: Service) -> None:
    """The most inputs that the API allows are answered, in order, though no model batch holds them."""
    response = service.embed([f"number {number}" for number in range(2048)], encoding_format="base64")
    assert response.status_code == 200
    assert [entry["index"] for entry in response.json()["data"]] == list(range(2048))


@pytest.mark.parametrize("row", ["x", [1]])
def test_2049_inputs_are_too_many(service: Service, row: Any) -> None:
    """One more is refused in the words that clients look for."""
    response = service.embed([row] * 2049)
    assert_error(response, 400, "array_too_long", param="input")
    assert response.json()["error"]["message"] == "'$.input' is invalid: array length must be 2048 or less"


def test_operators_limit_of_inputs(guarded: Service) -> None:
    """A lower limit of the operator's is the one that is named."""
    assert guarded.embed(["x"] * 20).status_code == 200
    assert_error(guarded.embed(["x"] * 21), 400, "array_too_long", param="input", phrase="must be 20 or less")


def test_too_many_tokens_in_all(guarded: Service) -> None:
    """A request whose inputs are too long together is told how many tokens it had."""
    response = guarded.embed(["word " * 148] * 20)
    assert_error(response, 400, "max_tokens_per_request", param="input")
    assert response.json()["error"]["message"] == "Requested 3000 tokens, max 2000 tokens per request."


@pytest.mark.parametrize("fields", [{}, {"input": None}])
def test_missing_input(service: Service, fields: dict[str, Any]) -> None:
    """Without `input`, or with null, the request says what is missing."""
    response = service.http.post("/v1/embeddings", json=fields)
    assert_error(response, 400, "missing_required_parameter", param="input")
    assert response.json()["error"]["message"] == "Missing required parameter: 'input'."


@pytest.mark.parametrize("given", [1, 1.5, True, {"text": "x"}])
def test_input_of_a_wrong_type(service: Service, given: Any) -> None:
    """What is neither a string nor an array is refused with the four forms that there are."""
    assert_error(service.embed(given), 400, "invalid_type", param="input", phrase="an array of strings")


@pytest.mark.parametrize(
    "given",
    [[], [[]], [[1], []], [None], ["a", None], ["a", 1], [1, "a"], ["a", ["b"]], ["a", [1]], [[1], 1], [["a"]], [[1, None]],
     [[[1]]], [True], [1, True], [1.0], [1, 2.5], [[1.0]], [[True]], [2**64], [-(2**63) - 1], [[2**100]], [{"text": "x"}]],
    ids=json.dumps,
)  # fmt: skip
def test_arrays_that_are_no_input(service: Service, given: Any) -> None:
    """Empty arrays, nulls, mixtures, truth values, fractions and huge numbers are refused."""
    response = service.embed(given)
    assert_error(response, 400, "invalid_input", param="input", phrase="'$.input' is invalid: ")


@pytest.mark.parametrize("given", [[1, 2, 3], [[1, 2], [3]], [-1], [2**63]])
def test_token_ids_are_refused_by_default(service: Service, given: Any) -> None:
    """Token ids are refused, with the two ways out: the client's and the operator's."""
    response = service.embed(given)
    assert_error(
        response, 400, "token_input_unsupported", param="input", phrase="check_embedding_ctx_length=False"
    )
    assert "token_input" in response.json()["error"]["message"]


@pytest.mark.parametrize("given", [[30522], [[101, -1]], [[5], [2**62]]])
def test_token_ids_out_of_range(guarded: Service, given: Any) -> None:
    """A number that is no token of the model is refused before the model sees it."""
    response = guarded.embed(given, model="team/own-ids")
    assert_error(response, 400, "invalid_value", param="input", phrase="which has ids 0 to 30521")


def test_token_ids_count_as_they_are(guarded: Service) -> None:
    """No special tokens are added to token ids, and they are cut like text."""
    response = guarded.embed([[5, 6], [7]], model="team/own-ids")
    assert response.json()["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
    response = guarded.embed([7] * 300, model="team/own-ids")
    assert (response.json()["usage"]["prompt_tokens"], response.headers["x-truncated-inputs"]) == (256, "1")


@pytest.mark.parametrize(
    "text",
    [r"\ud800", r"\udc00\ud800", r"a\ud83db", r"\u0000", r"\u0000\u0000", "😀", r"\ud83d\ude00", r"\ufeff", r"\u202e",
     " " * 100_000, "\\n" * 50_000, "é" * 1000, "ﷺ" * 500, "👩‍👩‍👧‍👦", "a" * 200_000, "[CLS] [SEP] [PAD] [MASK]", "\u0301" * 3000],
    ids=lambda text: ascii(text[:12]),
)  # fmt: skip
def test_odd_texts_have_vectors(service: Service, text: str) -> None:
    """Lone surrogates, NUL, marks without letters and long blanks are embedded like any text."""
    response = service.post(f'{{"input": ["{text}", "next"]}}'.encode())
    assert response.status_code == 200, response.text
    rows = [entry["embedding"] for entry in response.json()["data"]]
    assert all(math.isclose(math.hypot(*row), 1, abs_tol=1e-4) for row in rows)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nonsense", b'{"input": "x"', b'{"input": "x",}', b"{'input': 'x'}", b'{"input": NaN}', b'{"input": "\xff"}',
     b'{"input": "a\nb"}', b"\x1f\x8b\x08\x00", b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", b'{"input": 1' + b"0" * 5000 + b"}",
     b'[{"input": "x"}]', b'"x"', b"null", b"1"],
    ids=lambda body: ascii(body[:16]),
)  # fmt: skip
def test_bodies_that_are_no_json_object(service: Service, body: bytes) -> None:
    """What is not a JSON object is refused as such."""
    assert_error(service.post(body), 400, "invalid_json", phrase="JSON body of your request")


def test_bad_json_has_openais_words(service: Service) -> None:
    """Clients show this sentence."""
    message = service.post(b"{").json()["error"]["message"]
    assert message == "We could not parse the JSON body of your request."


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_content_type_is_not_asked_for(service: Service, content_type: str | None) -> None:
    """curl's default, or none at all, will do for JSON."""
    headers = {} if content_type is None else {"content-type": content_type}
    response = service.http.post("/v1/embeddings", content=b'{"input": "x"}', headers=headers)
    assert response.status_code == 200


def test_last_of_two_equal_keys_counts(service: Service) -> None:
    """As in every other JSON parser in use."""
    assert service.post(b'{"input": [], "input": "x"}').status_code == 200


def test_an_input_that_looks_like_an_error_is_quoted_safely(service: Service) -> None:
    """Errors that repeat what was sent stay valid, short JSON."""
    response = service.post(rb'{"input": "x", "encoding_format": "\ud800<script>' + b"y" * 5000 + b'"}')
    assert_error(response, 400, "invalid_value", param="encoding_format")
    assert len(response.content) < 500
