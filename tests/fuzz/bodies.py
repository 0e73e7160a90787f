"""Strategies for the body of `POST /v1/embeddings`: valid, with one invalid field, and arbitrary."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from tests.fuzz.contract import FIELDS
from tests.service import BUNDLED

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_INPUTS, MAX_TOKENS = 64, 4000
"""Limits of the fuzzed service, low so that many requests exceed them."""
PLAIN, FREE = "plain", "team/free"
"""Models of the fuzzed service, both the bundled one. `FREE` has prompts, and allows token ids and all dimensions."""
RERANKER, CLASSIFIER = "reranker", "classifier"
LONGEST, VOCABULARY = 256, 30_522

_UNITS = (
    "a", " ", "\n", "\0", "#", "é", "e\u0301", "\u0301", "中", "ﷺ", "\u202e", "\ufeff", "\u200d", "👩‍👩‍👧‍👦", "🇨🇳", "\ue000",
    "\U0010ffff", "\ud800", "\udc00", "[CLS]", "[PAD]", "##ing", "<s>", "word ", "0", "\x1b[31m", "\u2028", "İ", "ß", "ﬀ",
)  # fmt: skip
_ANY_CHARACTER = st.characters(exclude_categories=())
"""Includes surrogates, which JSON can contain as escapes."""

texts = st.one_of(
    st.text(_ANY_CHARACTER, max_size=30),
    st.sampled_from(["", "hello", "cats and dogs", *_UNITS]),
    st.builds(str.__mul__, st.sampled_from(_UNITS), st.integers(0, 300)),
)
token_rows = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=2 * LONGEST)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(_ANY_CHARACTER, max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


def _either(*names: str) -> Callable[[st.SearchStrategy[Any]], st.SearchStrategy[dict[str, Any]]]:
    """Return a function that maps values to fields: absent, or under one of the names."""

    def fields(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
        return st.just({}) | st.builds(lambda name, value: {name: value}, st.sampled_from(names), values)

    return fields


_OPTIONS: tuple[st.SearchStrategy[dict[str, Any]], ...] = (
    _either("encoding_format")(st.sampled_from([None, "float", "base64", "FLOAT", "Base64"])),
    _either("input_type", "task", "prompt_name")(
        st.sampled_from([None, "query", "document", "search_query", "passage", "retrieval.passage"])
    ),
    _either("truncate", "truncation")(st.sampled_from([None, True, False, "END", "start", "Start", "none"])),
    _either("truncate_prompt_tokens")(st.sampled_from([None, -1, 1, 2, 3, LONGEST - 1, LONGEST]) | st.integers(1, LONGEST)),
    _either("normalize", "normalized")(st.none() | st.booleans()),
    _either("user")(st.none() | texts),
    # Unknown fields.
    st.dictionaries(st.text(_ANY_CHARACTER, max_size=3).map("x-".__add__), json_values, max_size=2),
)  # fmt: skip
_TEXT_INPUTS = st.one_of(
    texts,
    st.lists(texts, min_size=1, max_size=6),
    st.builds(lambda text, n: [text] * n, st.sampled_from(["a", "", *_UNITS]), st.sampled_from([1, MAX_INPUTS - 1, MAX_INPUTS])),
)  # fmt: skip
_TOKEN_INPUTS = token_rows | st.lists(token_rows, min_size=1, max_size=4)


@st.composite
def valid_fields(draw: st.DrawFn) -> dict[str, Any]:
    """Draw a request that must be answered, or be rejected with one of `LENGTH_ERRORS`."""
    fields: dict[str, Any] = {}
    if draw(st.booleans()):
        fields |= {"model": FREE, "input": draw(_TEXT_INPUTS | _TOKEN_INPUTS)}
        sizes = st.sampled_from([None, 1, 2, 383, 384]) | st.integers(1, 384)
        fields |= draw(_either("dimensions", "output_dimension")(sizes))
    else:
        fields |= draw(st.sampled_from([{}, {"model": None}, {"model": PLAIN}, {"model": BUNDLED}]))
        fields["input"] = draw(_TEXT_INPUTS)
        fields |= draw(_either("dimensions")(st.sampled_from([None, 384])))
    for option in _OPTIONS:
        fields |= draw(option)
    order = draw(st.permutations(sorted(fields)))
    return {name: fields[name] for name in order}


LENGTH_ERRORS = {(400, "context_length_exceeded"), (400, "max_tokens_per_request")}
"""Errors of requests that are valid except that their texts are too long, one of them or all together."""


@dataclass(frozen=True, slots=True)
class InvalidField:
    """Invalid values of a field, and the errors that they may cause."""

    field: str
    values: tuple[Any, ...]
    expected: frozenset[tuple[int, str]]
    model: str | None = None
    """The model for which the values are invalid; None: any."""


def _invalid(field: str, codes: str, *values: Any, status: int = 400, model: str | None = None) -> InvalidField:
    return InvalidField(field, values, frozenset((status, code) for code in codes.split("|")), model)


ABSENT = object()
INVALID_FIELDS = (
    _invalid("input", "missing_required_parameter", ABSENT, None),
    _invalid("input", "invalid_type", 0, 1, -1.5, True, False, {}, {"text": "x"}, 2**63, 10**30),
    _invalid(
        "input", "invalid_input",
        [], [None], ["a", None], ["a", 1], [1, "a"], [1.5], [True], [1, True], [[]], [[1], []], [["a"]], [[1], [True]],
        [[1], 1], [{}], [[[1]]], [[1.0]], [[None]], [{"text": 1}], [{"text": "a"}, "a"], [10**30],
    ),
    _invalid("input", "array_too_long", ["a"] * (MAX_INPUTS + 1), [""] * 2049, [[1]] * (MAX_INPUTS + 1), [None] * 100),
    _invalid("input", "max_tokens_per_request", ["word " * 100] * MAX_INPUTS, ["#" * LONGEST] * 20),
    _invalid("input", "token_input_unsupported", [101, 102], [[1], [100_277]], [100_256], [-1], [2**63], [222] * 4, model=PLAIN),
    _invalid("input", "invalid_value", [-1], [VOCABULARY], [[1], [2**62]], [2**63], [[2**64 - 1]], model=FREE),
    _invalid("model", "model_not_found", "nope", "", " ", "../../etc/passwd", "team/", "free ", "PLAIN2", "\ud800", "\0", "x" * 10_000, status=404),
    _invalid("model", "invalid_type", 1, True, [], {}, 1.5, ["plain"]),
    _invalid("encoding_format", "invalid_value", "", "int8", "float ", "b64", "\ud800", "x" * 10_000),
    _invalid("encoding_format", "invalid_type", 1, True, False, [], {}, ["float"]),
    _invalid("dimensions", "invalid_dimensions", 385, 768, 2**31, 2**63, 2**64 - 1),
    _invalid("dimensions", "invalid_dimensions", 1, 383, model=PLAIN),
    _invalid("dimensions", "invalid_value", 0, -1, -(2**63)),
    _invalid("dimensions", "invalid_type|invalid_dimensions", 2**64, 10**30, 10**300),
    _invalid("dimensions", "invalid_type", "384", 384.0, True, False, [], {}, [384]),
    _invalid("output_dimension", "invalid_type", "1", 1.0, []),
    _invalid("input_type", "invalid_value", "", "nope", "Query", "query ", "\0", "\ud800", "x" * 10_000),
    _invalid("input_type", "invalid_type", 0, True, [], {}),
    _invalid("prompt_name", "invalid_type", 0, True, [], {}),
    _invalid("truncate", "invalid_value", "", "LEFT", "true", "END "),
    _invalid("truncate", "invalid_type", 0, 1, 1.5, [], {}),
    _invalid("truncate_prompt_tokens", "invalid_value", 0, -2, LONGEST + 1, 2**31, 2**63, -(2**63)),
    _invalid("truncate_prompt_tokens", "invalid_type", "1", 1.0, True, [], {}),
    _invalid("normalize", "invalid_type", 0, 1, "true", "", [], {}),
    _invalid("normalized", "invalid_type", 0, "false", []),
)  # fmt: skip
SYNONYMS = (
    ("dimensions", "output_dimension"), ("input_type", "task", "prompt_name"), ("truncate", "truncation"),
    ("normalize", "normalized"),
)  # fmt: skip


@st.composite
def invalid_fields(draw: st.DrawFn) -> tuple[dict[str, Any], frozenset[tuple[int, str]]]:
    """Draw a request with one invalid field, and the statuses and codes that it may get."""
    invalid = draw(st.sampled_from(INVALID_FIELDS))
    return make_invalid(draw(valid_fields()), invalid, draw(st.sampled_from(invalid.values)))


def make_invalid(
    fields: dict[str, Any], invalid: InvalidField, value: Any
) -> tuple[dict[str, Any], frozenset[tuple[int, str]]]:
    """Set an invalid value, and remove fields that could hide it: synonyms, and inputs that could be invalid too."""
    others = {name for names in SYNONYMS if invalid.field in names for name in names}
    kept = {name: value for name, value in fields.items() if name not in others}
    if invalid.field != "input":
        kept["input"] = "hello"
    if invalid.model is not None:
        kept["model"] = invalid.model
    elif invalid.field == "dimensions":
        kept["model"] = FREE
    if invalid.field in {"input", "model"}:
        kept = {name: kept[name] for name in kept if name in {"input", "model", "normalize"}}
    kept[invalid.field] = value
    return {name: value for name, value in kept.items() if value is not ABSENT}, invalid.expected


# --- arbitrary bodies ------------------------------------------------------------------------------------

_INSERTIONS = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-0", b"0x10", b"01", b"1" * 5000, b"1." + b"1" * 5000, b"[" * 2000, b"{\"a\":" * 2000,
    b"\\ud800", b"\\uDEAD\\uD800", b"\xed\xa0\x80", b"\xff", b"\xc0\x80", b"\x00", b"\n", b"\\x", b"\\u12", b"'", b'"', b",", b"}", b"]",
    b'"input":"x",', b'"input":[],', b'"model":null,', b"// x\n", b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"true", b"null",
)  # fmt: skip


def encoded(fields: Any, *, ascii_only: bool = True) -> bytes:
    """Return the fields as JSON, with escapes where they are necessary."""
    return json.dumps(fields, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


@st.composite
def arbitrary_bodies(draw: st.DrawFn) -> bytes:
    """Draw bytes: JSON of any shape, a damaged valid body, another charset, or noise."""
    kind = draw(st.integers(0, 9))
    if kind == 0:
        return draw(st.binary(max_size=200))
    if kind == 1:
        return encoded(draw(json_values))
    if kind == 2:
        names = st.sampled_from([*FIELDS, "x"])
        return encoded(draw(st.dictionaries(names, json_values | texts, max_size=6)))
    if kind == 3:
        depth = draw(st.integers(1, 3000))
        opening, closing = draw(st.sampled_from([(b"[", b"]"), (b'{"input":', b"}"), (b'{"x":[', b"]}")]))
        return b'{"input":"x","x":' + opening * depth + b"1" + closing * depth + b"}"
    body = encoded(draw(valid_fields()), ascii_only=draw(st.booleans()))
    if kind == 4:
        charset = draw(
            st.sampled_from(["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "latin-1", "gb18030"])
        )
        return body.decode("utf-8", "replace").encode(charset, "replace")
    if kind == 5:
        # Duplicate keys, of which the last one is used.
        return body[:-1] + b"," + encoded(draw(valid_fields()))[1:]
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(body)))
        until = draw(st.integers(at, min(len(body), at + 20)))
        body = body[:at] + draw(st.sampled_from(_INSERTIONS) | st.binary(max_size=3) | st.just(b"")) + body[until:]
    return body
