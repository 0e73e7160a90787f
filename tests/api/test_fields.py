"""The fields of a request for embeddings, except `input`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.service import BUNDLED, assert_error

if TYPE_CHECKING:
    from tests.service import Service

LONG = "word " * 400
"""402 tokens, special tokens included. The bundled model supports 256."""


def embedding(service: Service, **fields: Any) -> Any:
    response = service.embed("hello", **fields)
    assert response.status_code == 200, response.text
    return response.json()["data"][0]["embedding"]


@pytest.mark.parametrize("name", [BUNDLED, "all-MiniLM-L6-v2"])
def test_response_repeats_the_requested_name(service: Service, name: str) -> None:
    """A model is found by its id and by its unique last part, and the response has the requested name."""
    body = service.embed("hello", model=name).json()
    assert body["model"] == name
    assert body["object"] == "list"
    assert set(body) == {"object", "data", "model", "usage"}
    assert set(body["data"][0]) == {"object", "index", "embedding"}
    assert body["data"][0]["object"] == "embedding"


@pytest.mark.parametrize("fields", [{}, {"model": None}])
def test_default_model(service: Service, fields: dict[str, Any]) -> None:
    """Without a model, or with null, the default model answers under its alias."""
    assert service.embed("hello", **fields).json()["model"] == BUNDLED


@pytest.mark.parametrize(
    ("name", "alias"),
    [("team/own-ids", "team/own-ids"), ("own-ids", "team/own-ids"), (BUNDLED, "mini"), ("all-MiniLM-L6-v2", "mini"),
     ("MINI", "mini"), ("Strict:latest", "strict"), ("openai/strict", "strict"), ("mini-query", "mini"), ("mini-passage", "mini")],
)  # fmt: skip
def test_names_of_a_model_with_several_aliases(guarded: Service, name: str, alias: str) -> None:
    """Aliases, ids, unique last parts and similar names are accepted. An id with several aliases means the first."""
    response = guarded.embed("hello", model=name)
    assert response.json()["model"] == name
    assert guarded.http.get(f"/v1/models/{name}").json()["id"] == alias


@pytest.mark.parametrize(
    "name", ["sentence-transformers", "mini ", "mini-document", "strict-query", "mini-query-query"]
)
def test_other_names_are_unknown(guarded: Service, name: str) -> None:
    """The error lists the names. Names for queries exist only if the model has prompts for both sides of a search."""
    response = guarded.embed("hello", model=name)
    assert_error(response, 404, "model_not_found", param="model", phrase="Served here: mini, strict")


def test_name_chooses_the_prompt(guarded: Service) -> None:
    """NAME-query and NAME-passage have the prompts of these sides, unless the request has an `input_type` itself."""

    def tokens(name: str, **fields: str) -> int:
        count: int = guarded.embed("hello", model=name, **fields).json()["usage"]["total_tokens"]
        return count

    plain = tokens("mini")
    assert tokens("mini-query") == tokens("mini", input_type="query") == plain + 2
    assert tokens("mini-passage", input_type="query") == tokens("mini", input_type="query")


@pytest.mark.parametrize("name", ["", "nope", "x" * 5000, "a\nb\u2028c", "../../etc/passwd"])
def test_unknown_model(service: Service, name: str) -> None:
    """An unknown name gets a 404 that lists the served models."""
    response = service.embed("hello", model=name)
    assert_error(response, 404, "model_not_found", param="model", phrase=f"The model `{name[:200]}` does not exist")
    assert BUNDLED in response.json()["error"]["message"]


@pytest.mark.parametrize("field", ["model", "input_type", "encoding_format"])
@pytest.mark.parametrize("value", [1, True, ["a"], {"a": 1}])
def test_text_fields_reject_other_types(service: Service, field: str, value: Any) -> None:
    """The error names the field and the supported type."""
    response = service.embed("hello", **{field: value})
    assert_error(response, 400, "invalid_type", param=field, phrase=f"Invalid value for '{field}' = ")
    assert "Supported values: [a string]." in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("encoding", "expected"), [("float", list), ("FLOAT", list), (None, list), ("base64", str), ("Base64", str)]
)
def test_encoding_format(service: Service, encoding: str | None, expected: type) -> None:
    """Numbers are the default, and the case does not matter."""
    assert isinstance(embedding(service, encoding_format=encoding), expected)


def test_unknown_encoding_format(service: Service) -> None:
    """The error lists the supported formats."""
    response = service.embed("hello", encoding_format="int8")
    assert_error(response, 400, "invalid_value", param="encoding_format")
    assert response.json()["error"]["message"] == (
        "Invalid value for 'encoding_format' = 'int8'. Supported values: ['float', 'base64']."
    )


def test_null_and_unknown_fields_are_ignored(service: Service) -> None:
    """Null is the same as absent, and unknown fields change nothing."""
    nulls = dict.fromkeys(
        ["model", "encoding_format", "dimensions", "output_dimension", "user", "input_type", "task", "prompt_name",
         "truncate", "truncation", "truncate_prompt_tokens", "truncation_side", "normalize", "normalized",
         "output_dtype", "embedding_type", "embedding_types", "late_chunking", "return_multivector"]
    )  # fmt: skip
    unknown = {"user": "someone", "extra_body": {"deep": [1]}, "": 0, "dtype": 5}
    assert embedding(service, **nulls) == embedding(service, **unknown) == embedding(service)


@pytest.mark.parametrize("field", ["dimensions", "output_dimension"])
def test_native_dimensions_are_always_accepted(service: Service, field: str) -> None:
    """The model's native size is accepted even if the model supports no other size."""
    assert embedding(service, **{field: 384}) == embedding(service)


@pytest.mark.parametrize("size", [1, 383, 385, 100_000])
def test_unsupported_dimensions(service: Service, size: int) -> None:
    """The error for a size that the model does not support lists the supported sizes."""
    response = service.embed("hello", dimensions=size)
    assert_error(response, 400, "invalid_dimensions", param="dimensions", phrase="(allowed: 384)")
    message = response.json()["error"]["message"]
    assert "This model does not support specifying dimensions." in message
    assert "Its vectors have 384 dimensions: set 'dimensions' to 384" in message


def test_dimensions_of_the_settings(guarded: Service) -> None:
    """A list allows its sizes and the native size; `any` allows all sizes up to the native size."""
    assert len(embedding(guarded, model="team/own-ids", dimensions=64)) == 64
    response = guarded.embed("hello", model="team/own-ids", dimensions=65)
    assert_error(response, 400, "invalid_dimensions", param="dimensions", phrase="(allowed: 64, 128, 384)")
    assert len(embedding(guarded, model="mini", dimensions=1)) == 1
    response = guarded.embed("hello", model="mini", dimensions=385)
    assert_error(response, 400, "invalid_dimensions", param="dimensions", phrase="(allowed: 1 to 384)")


@pytest.mark.parametrize(("size", "code"), [(0, "invalid_value"), (-1, "invalid_value"), (1.5, "invalid_type"), (384.0, "invalid_type"), ("384", "invalid_type"), (True, "invalid_type"), (2**70, "invalid_type")])  # fmt: skip
def test_invalid_dimensions(service: Service, size: object, code: str) -> None:
    """Sizes below 1 and values that are not integers are rejected."""
    assert_error(service.embed("hello", dimensions=size), 400, code, param="dimensions")


@pytest.mark.parametrize("name", ["query", "search_query", "retrieval.query", "document", "passage", "search_document", "retrieval.passage"])  # fmt: skip
@pytest.mark.parametrize("field", ["input_type", "task", "prompt_name"])
def test_known_input_type_without_a_prompt(service: Service, field: str, name: str) -> None:
    """The usual names are accepted and change nothing, because the bundled model has no prompts."""
    assert embedding(service, **{field: name}) == embedding(service)


@pytest.mark.parametrize("name", ["classification", "clustering", "text-matching", "separation", "code.query"])
def test_other_tasks_without_a_prompt(service: Service, name: str) -> None:
    """Tasks of other APIs are harmless."""
    assert embedding(service, task=name) == embedding(service)


def test_unknown_input_type(service: Service) -> None:
    """The error lists the supported names."""
    response = service.embed("hello", input_type="poem")
    assert_error(response, 400, "invalid_value", param="input_type", phrase="'query', 'search_query'")


@pytest.mark.parametrize("field", ["truncate", "truncation"])
@pytest.mark.parametrize("value", [None, True, "END", "Start"])
def test_long_inputs_are_truncated(service: Service, field: str, value: Any) -> None:
    """An input that is too long is truncated, and a header has the number of truncated inputs."""
    response = service.http.post("/v1/embeddings", json={"input": ["short", LONG], field: value})
    assert response.status_code == 200
    assert response.headers["x-truncated-inputs"] == "1"
    assert response.json()["usage"] == {"prompt_tokens": 3 + 256, "total_tokens": 3 + 256}


def test_no_header_without_truncation(service: Service) -> None:
    """The header is only sent if an input was truncated."""
    assert "x-truncated-inputs" not in service.embed("short").headers


@pytest.mark.parametrize("field", ["truncate", "truncation"])
@pytest.mark.parametrize("value", [False, "NONE", "none"])
def test_long_inputs_are_rejected_without_truncation(service: Service, field: str, value: Any) -> None:
    """With NONE or false, an input that is too long is rejected, and the error has its index."""
    response = service.http.post("/v1/embeddings", json={"input": ["short", LONG], field: value})
    assert_error(response, 400, "context_length_exceeded", param="input")
    assert response.json()["error"]["message"] == "Invalid 'input[1]': maximum input length is 256 tokens."


def test_truncate_of_the_settings(guarded: Service) -> None:
    """The settings can turn truncation off for a model, and a request can turn it on again."""
    assert_error(guarded.embed(LONG, model="strict"), 400, "context_length_exceeded", param="input")
    assert guarded.embed(LONG, model="strict", truncate=True).headers["x-truncated-inputs"] == "1"


@pytest.mark.parametrize(("value", "code"), [("LEFT", "invalid_value"), (1, "invalid_type"), ([], "invalid_type")])
def test_invalid_truncate(service: Service, value: Any, code: str) -> None:
    """The error lists the supported values."""
    response = service.embed("hello", truncate=value)
    assert_error(
        response, 400, code, param="truncate", phrase="Supported values: [true, false, 'NONE', 'START', 'END']"
    )


@pytest.mark.parametrize(("limit", "tokens"), [(-1, 256), (1, 1), (10, 10), (256, 256)])
def test_truncate_prompt_tokens(service: Service, limit: int, tokens: int) -> None:
    """-1 is the model's own limit; smaller limits truncate to fewer tokens."""
    response = service.embed(LONG, truncate_prompt_tokens=limit)
    assert response.json()["usage"]["prompt_tokens"] == tokens
    assert response.headers["x-truncated-inputs"] == "1"


@pytest.mark.parametrize(("limit", "code"), [(0, "invalid_value"), (-2, "invalid_value"), (257, "invalid_value"), ("5", "invalid_type"), (1.0, "invalid_type"), (True, "invalid_type")])  # fmt: skip
def test_invalid_truncate_prompt_tokens(service: Service, limit: object, code: str) -> None:
    """Limits outside of the range of the model are rejected."""
    assert_error(service.embed("hello", truncate_prompt_tokens=limit), 400, code, param="truncate_prompt_tokens")


@pytest.mark.parametrize("field", ["normalize", "normalized"])
@pytest.mark.parametrize("value", ["true", 1, 0.0])
def test_invalid_normalize(service: Service, field: str, value: Any) -> None:
    """Only true and false are accepted."""
    assert_error(service.embed("hello", **{field: value}), 400, "invalid_type", param=field, phrase="[true, false]")


@pytest.mark.parametrize(
    ("field", "value", "harmless"),
    [
        ("late_chunking", True, False),
        ("return_multivector", True, False),
        ("add_special_tokens", False, True),
        ("endianness", "big", "little"),
        ("output_type", "sparse", "dense"),
    ],
)
def test_fields_that_would_change_the_meaning_are_rejected(
    service: Service, field: str, value: Any, harmless: Any
) -> None:
    """Unless their value asks for what the service does anyway."""
    assert_error(service.embed("hello", **{field: value}), 400, "invalid_value", param=field, phrase="Supported values")
    assert embedding(service, **{field: harmless}) == embedding(service)


@pytest.mark.parametrize("name", ["truncation_side", "truncation_direction"])
def test_truncation_side(service: Service, name: str) -> None:
    """It is the side of `truncate`, and contradicts only the other side."""
    text = "first " + "word " * 400 + "last"

    def vector(**fields: Any) -> Any:
        response = service.embed(text, **fields)
        assert response.status_code == 200, response.text
        return response.json()["data"][0]["embedding"]

    left, right = vector(truncate="START"), vector(truncate="END")
    assert left != right
    for more in ({}, {"truncate": True}, {"truncation": True}):
        assert vector(**{name: "left"}, **more) == left
        assert vector(**{name: "Right"}, **more) == right
    assert vector(**{name: "left"}, truncate="START") == left
    assert_error(service.embed(text, **{name: "left"}, truncate=False), 400, "context_length_exceeded", param="input")
    assert_error(service.embed(text, **{name: "left"}, truncate="END"), 400, "invalid_value", param="truncation_side")
    assert_error(service.embed(text, **{name: "up"}), 400, "invalid_value", param=name, phrase="'left', 'right'")
