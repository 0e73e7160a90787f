"""`POST /v1/embeddings` with generated bodies: correct vectors, or an error of the contract."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.api.helpers import cosines
from tests.fuzz.bodies import (
    CLASSIFIER,
    FREE,
    INVALID_FIELDS,
    LENGTH_ERRORS,
    PLAIN,
    RERANKER,
    arbitrary_bodies,
    encoded,
    invalid_fields,
    make_invalid,
    valid_fields,
)
from tests.fuzz.contract import Response, count_inputs, vectors
from tests.fuzz.fuzzing import fuzz_test
from tests.service import BUNDLED

if TYPE_CHECKING:
    from tests.fuzz.fuzzing import Fuzz

_DEEP = 150
"""Nesting depth above which a parser may reject valid JSON."""


@fuzz_test
def test_valid_requests_are_answered(fuzz: Fuzz, scale: int) -> None:
    """The response to a valid request has a vector for each input in order, the same in both encodings."""

    @fuzz.settings(0.2 * scale)
    @given(valid_fields(), st.booleans())
    def check_valid(fields: dict[str, Any], ascii_only: bool) -> None:
        response = fuzz.post(encoded(fields, ascii_only=ascii_only))
        if (response.status, response.code) in LENGTH_ERRORS:
            return
        assert response.status == 200, response.body
        rows = vectors(response, fields, default_model=PLAIN)
        other = "float" if (fields.get("encoding_format") or "").lower() == "base64" else "base64"
        again = fields | {"encoding_format": other}
        repeated = vectors(fuzz.post(encoded(again)), again, default_model=PLAIN)
        # Not exactly equal, because the composition of batches depends on timing.
        assert cosines(rows, repeated).min() > 0.999

    check_valid()
    fuzz.assert_alive()


@fuzz_test
def test_requests_with_one_invalid_field(fuzz: Fuzz, scale: int) -> None:
    """One invalid value among valid ones is rejected with its code."""

    @fuzz.settings(0.2 * scale)
    @given(invalid_fields())
    def check_invalid(drawn: tuple[dict[str, Any], frozenset[tuple[int, str]]]) -> None:
        fields, expected = drawn
        response = fuzz.post(encoded(fields))
        assert (response.status, response.code) in expected, (response.status, response.body)

    check_invalid()
    fuzz.assert_alive()


@pytest.mark.parametrize("invalid", INVALID_FIELDS, ids=lambda invalid: f"{invalid.field} {min(invalid.expected)[1]}")
def test_each_invalid_value(fuzz: Fuzz, invalid: Any) -> None:
    """Every known invalid value is rejected with its code and the name of the field."""
    for value in invalid.values:
        fields, expected = make_invalid({"input": "hello"}, invalid, value)
        response = fuzz.post(encoded(fields))
        assert (response.status, response.code) in expected, (fields, response.status, response.body)
        assert json.loads(response.body)["error"]["param"] == invalid.field


@fuzz_test
def test_arbitrary_bodies(fuzz: Fuzz, scale: int) -> None:
    """A body that Python cannot parse is rejected as invalid JSON, and all others are parsed."""

    @fuzz.settings(0.25 * scale)
    @given(arbitrary_bodies())
    def check_body(body: bytes) -> None:
        _check_parsing(fuzz.post(body), body)

    check_body()
    fuzz.assert_alive()


def _check_parsing(response: Response, body: bytes) -> None:
    try:
        fields = json.loads(body, parse_constant=_reject_constant, parse_int=_parse_integer)
    except (ValueError, RecursionError):
        assert response.code == "invalid_json", (response.status, response.body[:300])
        return
    if not isinstance(fields, dict):
        assert response.code == "invalid_json"
    elif response.code == "invalid_json":
        # The values of a large body in another encoding are not counted, so that it is not parsed.
        is_large_utf_16 = 0 in body[:4] and "in UTF-8" in response.body.decode()
        assert is_large_utf_16 or max(body.count(b"["), body.count(b"{")) > _DEEP
    elif response.status == 200:
        rows = vectors(response, fields, default_model=PLAIN)
        assert len(rows) == count_inputs(fields["input"])


def _reject_constant(name: str) -> None:
    raise ValueError(name)


def _parse_integer(digits: str) -> float:
    if math.isinf(float(digits)):
        raise ValueError(digits)
    return int(digits)


_HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "content-type": st.sampled_from(
            ["application/json", "application/json; charset=latin-1", "text/plain", "multipart/form-data", "", "x" * 500]
        ),
        "content-encoding": st.sampled_from(["identity", "Identity", "gzip", "br", "", "x" * 500]),
        "authorization": st.sampled_from(["", "Bearer", "Basic eDp5", "Bearer sk-fuzz", "Bearer schlüssel"]),
        "x-request-id": st.sampled_from(["mine-1", "", "a b", "x" * 128, "x" * 129, "<script>", 'a"b', "a\tb", "é"]),
        "origin": st.sampled_from(["https://app.example", "https://evil.example", "null", ""]),
        "host": st.sampled_from(["localhost", "127.0.0.1", "[::1]:80", "evil.example", "localhost.evil.example", "x" * 300]),
        "accept": st.sampled_from(["*/*", "text/html", "application/xml;q=0"]),
        "expect": st.sampled_from(["100-continue", "nonsense"]),
        "x-anything": st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=40).map(str.strip),
    },
)  # fmt: skip
_KNOWN_HOSTS = {None, "localhost", "127.0.0.1", "[::1]:80"}


@fuzz_test
def test_headers(fuzz: Fuzz, scale: int) -> None:
    """A wrong host, key or encoding is rejected, in this order; a valid request id is returned; others are ignored."""

    @fuzz.settings(0.1 * scale)
    @given(_HEADERS)
    def check_headers(headers: dict[str, str]) -> None:
        raw = {name: value.encode("latin-1", "replace") for name, value in headers.items()}
        response = fuzz.post(b'{"input": "hello"}', raw)
        if headers.get("host") not in _KNOWN_HOSTS:
            assert response.code == "host_not_allowed"
        elif "authorization" in headers:
            assert response.code == "invalid_api_key"
        elif headers.get("content-encoding") == "gzip":
            assert response.code == "invalid_json"
        elif headers.get("content-encoding", "").lower() not in ("", "identity"):
            assert response.code == "unsupported_content_encoding"
        else:
            assert response.status == 200, response.body
            allowed = response.headers.get("access-control-allow-origin")
            assert allowed == (headers["origin"] if headers.get("origin") == "https://app.example" else None)
        identifier = headers.get("x-request-id", "")
        is_returned = response.headers["x-request-id"] == identifier
        assert is_returned == (identifier in {"mine-1", "x" * 128})

    check_headers()
    fuzz.assert_alive()


@pytest.mark.parametrize(
    "body",
    [
        b"", b"\xef\xbb\xbf{}", b'{"input":"x","input":["y","z"]}', b'{"input":"\\ud800"}', '{"input":"中"}'.encode("utf-16"),
        b'{"input":"x","dimensions":1e999}', b'{"input":NaN}', b'{"input":"x","dimensions":' + b"9" * 4300 + b'}',
        b'{"input":"\\ud800","truncate_prompt_tokens":' + b"9" * 4300 + b"}", b'{"input":"\xed\xa0\x80"}',
        b'{"input":"\\ud800","dimensions":' + b"9" * 4300 + b"}", b'{"input":[' + b"1," * 60_000 + b"1]}",
        b'{"x":"\\ud800","model":"team/free","input":[' + b"9" * 4300 + b"]}",
    ],
    ids=lambda body: ascii(body[:40]),
)  # fmt: skip
def test_bodies_of_former_defects(fuzz: Fuzz, body: bytes) -> None:
    """Bodies that were parsed incorrectly once."""
    _check_parsing(fuzz.post(body), body)


def test_served_models(fuzz: Fuzz) -> None:
    """The fuzzed service serves the models that the strategies use."""
    listed = [entry["id"] for entry in fuzz.service.http.get("/v1/models").json()["data"]]
    assert listed == [PLAIN, FREE, RERANKER, CLASSIFIER]
    assert fuzz.service.embed("x", model=BUNDLED).status_code == 200
