"""POST /v1/embeddings, whatever its body: a right answer, or the contract's refusal."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.bodies import (
    CUTS,
    FAULTS,
    FREE,
    PLAIN,
    encoded,
    spoil,
    spoiled_fields,
    valid_fields,
    wild_bodies,
)
from tests.fuzz.contract import Answer, inputs_in, vectors
from tests.service import BUNDLED

if TYPE_CHECKING:
    from tests.fuzz.fuzzing import Fuzz

_DEEP = 150
"""Nesting from which a parser may give up."""


def test_valid_requests_are_answered(fuzz: Fuzz) -> None:
    """A right request has a vector for each input, in order, and the same ones in both encodings."""

    @fuzz.settings(0.2)
    @given(valid_fields(), st.booleans())
    def answered(fields: dict[str, Any], ascii_only: bool) -> None:
        answer = fuzz.post(encoded(fields, ascii_only=ascii_only))
        if (answer.status, answer.code) in CUTS:
            return
        assert answer.status == 200, answer.body
        rows = vectors(answer, fields, default_model=PLAIN)
        other = "float" if (fields.get("encoding_format") or "").lower() == "base64" else "base64"
        again = fields | {"encoding_format": other}
        repeated = vectors(fuzz.post(encoded(again)), again, default_model=PLAIN)
        # Not to the last bit: which inputs share a batch depends on when a lane is free.
        np.testing.assert_array_less(0.999, _cosines(rows, repeated))

    answered()
    fuzz.assert_alive()


def _cosines(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    lengths = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    cosines: np.ndarray[Any, Any] = (left * right).sum(axis=1) / lengths
    return cosines


def test_requests_with_a_fault_are_told_which(fuzz: Fuzz) -> None:
    """One wrong value among right ones is refused with the code for it, and with the field's name."""

    @fuzz.settings(0.2)
    @given(spoiled_fields())
    def refused(drawn: tuple[dict[str, Any], frozenset[tuple[int, str]]]) -> None:
        fields, expected = drawn
        answer = fuzz.post(encoded(fields))
        assert (answer.status, answer.code) in expected, (answer.status, answer.body)

    refused()
    fuzz.assert_alive()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.field} {min(fault.expected)[1]}")
def test_each_fault_is_refused(fuzz: Fuzz, fault: Any) -> None:
    """Every wrong value that we know of, once, whatever chance would have drawn."""
    for value in fault.values:
        fields, expected = spoil({"input": "hello"}, fault, value)
        answer = fuzz.post(encoded(fields))
        assert (answer.status, answer.code) in expected, (fields, answer.status, answer.body)
        assert json.loads(answer.body)["error"]["param"] == fault.field


def test_any_bytes_are_read_as_json_or_refused(fuzz: Fuzz) -> None:
    """Damaged, foreign or endless JSON is answered where Python can read it, and refused as no JSON where not."""

    @fuzz.settings(0.25)
    @given(wild_bodies())
    def read_or_refused(body: bytes) -> None:
        _check_reading(fuzz.post(body), body)

    read_or_refused()
    fuzz.assert_alive()


def _check_reading(answer: Answer, body: bytes) -> None:
    try:
        fields = json.loads(body, parse_constant=_no_constants, parse_int=_number)
    except (ValueError, RecursionError):
        assert answer.code == "invalid_json", (answer.status, answer.body[:300])
        return
    if not isinstance(fields, dict):
        assert answer.code == "invalid_json"
    elif answer.code == "invalid_json":
        assert max(body.count(b"["), body.count(b"{")) > _DEEP
    elif answer.status == 200:
        rows = vectors(answer, fields, default_model=PLAIN)
        assert len(rows) == inputs_in(fields["input"])


def _no_constants(name: str) -> None:
    raise ValueError(name)


def _number(digits: str) -> float:
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


def test_headers_change_who_is_answered_and_nothing_else(fuzz: Fuzz) -> None:
    """A wrong host, key or encoding is refused, in this order; a sane request id comes back; the rest is ignored."""

    @fuzz.settings(0.1)
    @given(_HEADERS)
    def answered(headers: dict[str, str]) -> None:
        raw = {name: value.encode("latin-1", "replace") for name, value in headers.items()}
        answer = fuzz.post(b'{"input": "hello"}', raw)  # type: ignore[arg-type]  # httpx takes bytes too
        if headers.get("host") not in _KNOWN_HOSTS:
            assert answer.code == "host_not_allowed"
        elif "authorization" in headers:
            assert answer.code == "invalid_api_key"
        elif headers.get("content-encoding", "identity").lower() != "identity":
            assert answer.code == "unsupported_content_encoding"
        else:
            assert answer.status == 200, answer.body
            allowed = answer.headers.get("access-control-allow-origin")
            assert allowed == (headers["origin"] if headers.get("origin") == "https://app.example" else None)
        wished = headers.get("x-request-id", "")
        assert (answer.headers["x-request-id"] == wished) == (wished in {"mine-1", "x" * 128})

    answered()
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
def test_bodies_worth_remembering(fuzz: Fuzz, body: bytes) -> None:
    """What once was, or nearly was, answered wrongly."""
    _check_reading(fuzz.post(body), body)


def test_names_of_the_models(fuzz: Fuzz) -> None:
    """The fuzzed service serves what the strategies think that it serves."""
    listed = [entry["id"] for entry in fuzz.service.http.get("/v1/models").json()["data"]]
    assert listed == [PLAIN, FREE]
    assert fuzz.service.embed("x", model=BUNDLED).status_code == 200
