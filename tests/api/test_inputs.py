"""The `input` of a request for embeddings, and its JSON."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest

from tests.service import assert_error

if TYPE_CHECKING:
    from tests.service import Service


@pytest.mark.parametrize("value", ["", [""], ["", "x", ""], " ", "\n\t"])
def test_empty_text(service: Service, value: Any) -> None:
    """Empty strings, which LangChain sends, are embedded like other texts."""
    response = service.embed(value)
    assert response.status_code == 200
    assert len(response.json()["data"]) == (len(value) if isinstance(value, list) else 1)
    assert response.json()["usage"]["prompt_tokens"] >= 2


@pytest.mark.parametrize("value", ["", [""], ["x", ""]])
def test_strict_input_rejects_empty_text(guarded: Service, value: Any) -> None:
    """With EMB_PROVIDER_STRICT_INPUT=true, empty strings are rejected as by api.openai.com."""
    assert_error(guarded.embed(value), 400, "invalid_input", param="input", phrase="'$.input' is invalid")
    assert guarded.embed(" ").status_code == 200


def test_2048_inputs(service: Service) -> None:
    """The maximum number of inputs is answered in order, although it exceeds the size of a batch."""
    response = service.embed([f"number {number}" for number in range(2048)], encoding_format="base64")
    assert response.status_code == 200
    assert [entry["index"] for entry in response.json()["data"]] == list(range(2048))


@pytest.mark.parametrize("row", ["x", [1]])
def test_2049_inputs(service: Service, row: Any) -> None:
    """One more input is rejected with the text that clients look for."""
    response = service.embed([row] * 2049)
    assert_error(response, 400, "array_too_long", param="input")
    assert response.json()["error"]["message"] == "'$.input' is invalid: array length must be 2048 or less"


def test_max_inputs_of_the_settings(guarded: Service) -> None:
    """The error has the limit of the settings."""
    assert guarded.embed(["x"] * 20).status_code == 200
    assert_error(guarded.embed(["x"] * 21), 400, "array_too_long", param="input", phrase="must be 20 or less")


def test_too_many_tokens(guarded: Service) -> None:
    """The error has the number of tokens of the request."""
    response = guarded.embed(["word " * 148] * 20)
    assert_error(response, 400, "max_tokens_per_request", param="input")
    assert response.json()["error"]["message"] == "Requested 3000 tokens, max 2000 tokens per request."


@pytest.mark.parametrize("fields", [{}, {"input": None}])
def test_missing_input(service: Service, fields: dict[str, Any]) -> None:
    """Without `input`, or with null, the error names the missing field."""
    response = service.http.post("/v1/embeddings", json=fields)
    assert_error(response, 400, "missing_required_parameter", param="input")
    assert response.json()["error"]["message"] == "Missing required parameter: 'input'."


@pytest.mark.parametrize("value", [1, 1.5, True, {"text": "x"}])
def test_input_of_a_wrong_type(service: Service, value: Any) -> None:
    """The error lists the supported types."""
    assert_error(service.embed(value), 400, "invalid_type", param="input", phrase="an array of strings")


@pytest.mark.parametrize(
    "value",
    [[], [[]], [[1], []], [None], ["a", None], ["a", 1], [1, "a"], ["a", ["b"]], ["a", [1]], [[1], 1], [["a"]], [[1, None]],
     [[[1]]], [True], [1, True], [1.0], [1, 2.5], [[1.0]], [[True]], [2**64], [-(2**63) - 1], [[2**100]], [{"text": 1}], [{"image": "x"}]],
    ids=json.dumps,
)  # fmt: skip
def test_invalid_arrays(service: Service, value: Any) -> None:
    """Empty arrays, nulls, mixed types, booleans, fractions and integers of more than 64 bits are rejected."""
    response = service.embed(value)
    assert_error(response, 400, "invalid_input", param="input", phrase="'$.input' is invalid: ")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([101, 7592, 2088, 102], "begin and end with the special tokens of the model"),
        ([[101, 102], [101, 7592, 102]], "begin and end with the special tokens of the model"),
        ([151_643], "151643 is out of the range 0 to 100276"),
        ([[15339], [-1]], "'input[1]': these are not token ids of OpenAI's tokenizer cl100k_base"),
        ([2**63], "is out of the range"),
        ([[15339, 222, 15339]], "not valid UTF-8"),
    ],
)
def test_token_ids_of_other_tokenizers(service: Service, value: Any, reason: str) -> None:
    """The error says why they are not those of OpenAI, and names the values of the setting and the option of LangChain."""
    response = service.embed(value)
    assert_error(response, 400, "token_input_unsupported", param="input", phrase=reason)
    message = response.json()["error"]["message"]
    assert all(part in message for part in ("check_embedding_ctx_length=False", "token_input", "'model'", "'cl100k'"))


def test_token_ids_of_openai(service: Service) -> None:
    """One row, or several, of which some begin and end like those of the model."""
    (vector,) = service.embed([15339, 1917]).json()["data"]
    assert vector["embedding"] == service.embed("hello world").json()["data"][0]["embedding"]
    assert service.embed([[101, 102], [15339, 1917]]).status_code == 200


@pytest.mark.parametrize("value", [[30522], [[101, -1]], [[5], [2**62]]])
def test_token_ids_out_of_range(guarded: Service, value: Any) -> None:
    """Numbers outside of the model's vocabulary are rejected."""
    response = guarded.embed(value, model="team/own-ids")
    assert_error(response, 400, "invalid_value", param="input", phrase="which has ids 0 to 30521")


def test_token_ids_are_used_unchanged(guarded: Service) -> None:
    """No special tokens are added to token ids, and they are truncated like texts."""
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
def test_unusual_texts(service: Service, text: str) -> None:
    """Lone surrogates, NUL, combining marks and long whitespace are embedded like other texts."""
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
def test_invalid_json(service: Service, body: bytes) -> None:
    """A body that is not a JSON object is rejected."""
    assert_error(service.post(body), 400, "invalid_json", phrase="JSON body of your request")


def test_error_of_invalid_json(service: Service) -> None:
    """The error has OpenAI's text, which clients show."""
    message = service.post(b"{").json()["error"]["message"]
    assert message == "We could not parse the JSON body of your request."


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_content_type_is_ignored(service: Service, content_type: str | None) -> None:
    """JSON is accepted with any Content-Type, for example the default of curl, or none."""
    headers = {} if content_type is None else {"content-type": content_type}
    response = service.http.post("/v1/embeddings", content=b'{"input": "x"}', headers=headers)
    assert response.status_code == 200


def test_last_duplicate_key_is_used(service: Service) -> None:
    """As in other JSON parsers, the last value of a duplicate key is used."""
    assert service.post(b'{"input": [], "input": "x"}').status_code == 200


def test_quotations_are_valid_and_short(service: Service) -> None:
    """An error that quotes the request is valid and short JSON."""
    response = service.post(rb'{"input": "x", "encoding_format": "\ud800<script>' + b"y" * 5000 + b'"}')
    assert_error(response, 400, "invalid_value", param="encoding_format")
    assert len(response.content) < 500
