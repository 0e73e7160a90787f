"""Each field of a request, line by line of the contract."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.service import BUNDLED, assert_error

if TYPE_CHECKING:
    from tests.service import Service

LONG = "word " * 400
"""402 tokens with the special ones; the bundled model reads 256."""


def embedding(service: Service, **fields: Any) -> Any:
    response = service.embed("hello", **fields)
    assert response.status_code == 200, response.text
    return response.json()["data"][0]["embedding"]


@pytest.mark.parametrize("name", [BUNDLED, "all-MiniLM-L6-v2"])
def test_model_is_echoed_as_it_was_asked_for(service: Service, name: str) -> None:
    """A model answers to its id and to the unique last part of it, and the answer repeats that name."""
    body = service.embed("hello", model=name).json()
    assert body["model"] == name
    assert body["object"] == "list"
    assert set(body) == {"object", "data", "model", "usage"}
    assert set(body["data"][0]) == {"object", "index", "embedding"}
    assert body["data"][0]["object"] == "embedding"


@pytest.mark.parametrize("fields", [{}, {"model": None}])
def test_default_model_answers_where_none_is_named(service: Service, fields: dict[str, Any]) -> None:
    """Without a model, or with null, the default model answers under its alias."""
    assert service.embed("hello", **fields).json()["model"] == BUNDLED


@pytest.mark.parametrize("name", ["team/own-ids", "own-ids", BUNDLED])
def test_alias_goes_before_id_and_last_part(guarded: Service, name: str) -> None:
    """An alias, its unique last part, and an id name a model; an id that several aliases share means the first."""
    response = guarded.embed("hello", model=name)
    assert response.json()["model"] == name
    meant = "mini" if name == BUNDLED else "team/own-ids"
    assert guarded.http.get(f"/v1/models/{name}").json()["id"] == meant


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", "MINI", "half "])
def test_last_part_that_several_models_share_names_none(guarded: Service, name: str) -> None:
    """What could mean several models, or is no name at all, is a 404 that lists the names."""
    response = guarded.embed("hello", model=name)
    assert_error(response, 404, "model_not_found", param="model", phrase="Served here: mini, half")


@pytest.mark.parametrize(
    "name", ["", "nope", "ALL-MINILM-L6-V2", "x" * 5000, "a\nb\u2028c", "../../etc/passwd"]
)
def test_unknown_model_is_404(service: Service, name: str) -> None:
    """A name that is not served is a 404 that says what is served."""
    response = service.embed("hello", model=name)
    assert_error(
        response, 404, "model_not_found", param="model", phrase=f"The model `{name[:200]}` does not exist"
    )
    assert BUNDLED in response.json()["error"]["message"]


@pytest.mark.parametrize("field", ["model", "input_type", "encoding_format"])
@pytest.mark.parametrize("value", [1, True, ["a"], {"a": 1}])
def test_text_fields_refuse_other_types(service: Service, field: str, value: Any) -> None:
    """A field of text says so when it is given something else."""
    response = service.embed("hello", **{field: value})
    assert_error(response, 400, "invalid_type", param=field, phrase=f"Invalid value for '{field}' = ")
    assert "Supported values: [a string]." in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("given", "kind"), [("float", list), ("FLOAT", list), (None, list), ("base64", str), ("Base64", str)]
)
def test_encoding_format_in_any_case(service: Service, given: str | None, kind: type) -> None:
    """Numbers are the default, and upper case is no other format."""
    assert isinstance(embedding(service, encoding_format=given), kind)


def test_unknown_encoding_format_names_the_known_ones(service: Service) -> None:
    """Another format is refused with the two that there are."""
    response = service.embed("hello", encoding_format="int8")
    assert_error(response, 400, "invalid_value", param="encoding_format")
    assert response.json()["error"]["message"] == (
        "Invalid value for 'encoding_format' = 'int8'. Supported values: ['float', 'base64']."
    )


def test_null_is_the_same_as_absent_and_unknown_fields_are_ignored(service: Service) -> None:
    """Clients that send every field they know, null or not ours, get the plain answer."""
    nulls = dict.fromkeys(
        ["model", "encoding_format", "dimensions", "output_dimension", "user", "input_type", "task", "prompt_name",
         "truncate", "truncation", "truncate_prompt_tokens", "normalize", "normalized"]
    )  # fmt: skip
    unknown = {
        "user": "someone",
        "extra_body": {"deep": [1]},
        "late_chunking": True,
        "": 0,
        "embedding_type": 5,
    }
    assert embedding(service, **nulls) == embedding(service, **unknown) == embedding(service)


@pytest.mark.parametrize("field", ["dimensions", "output_dimension"])
def test_native_dimensions_are_always_accepted(service: Service, field: str) -> None:
    """The model's own size may be named even where no other is possible."""
    assert embedding(service, **{field: 384}) == embedding(service)


@pytest.mark.parametrize("size", [1, 383, 385, 100_000])
def test_other_dimensions_are_refused_where_the_model_has_none(service: Service, size: int) -> None:
    """A size the model was not trained for is refused with the ones that are allowed."""
    response = service.embed("hello", dimensions=size)
    assert_error(response, 400, "invalid_dimensions", param="dimensions", phrase="(allowed: 384)")
    assert "This model does not support specifying dimensions." in response.json()["error"]["message"]


def test_dimensions_that_the_operator_allowed(guarded: Service) -> None:
    """A list of sizes allows these and the model's own; `any` allows what is not larger than that."""
    assert len(embedding(guarded, model="team/own-ids", dimensions=64)) == 64
    response = guarded.embed("hello", model="team/own-ids", dimensions=65)
    assert_error(response, 400, "invalid_dimensions", param="dimensions", phrase="(allowed: 64, 128, 384)")
    assert len(embedding(guarded, model="mini", dimensions=1)) == 1
    response = guarded.embed("hello", model="mini", dimensions=385)
    assert_error(response, 400, "invalid_dimensions", param="dimensions", phrase="(allowed: 1 to 384)")


@pytest.mark.parametrize(("size", "code"), [(0, "invalid_value"), (-1, "invalid_value"), (1.5, "invalid_type"), (384.0, "invalid_type"), ("384", "invalid_type"), (True, "invalid_type"), (2**70, "invalid_type")])  # fmt: skip
def test_dimensions_that_are_no_size(service: Service, size: object, code: str) -> None:
    """Sizes below 1 and what is no whole number are refused."""
    assert_error(service.embed("hello", dimensions=size), 400, code, param="dimensions")


@pytest.mark.parametrize("name", ["query", "search_query", "retrieval.query", "document", "passage", "search_document", "retrieval.passage"])  # fmt: skip
@pytest.mark.parametrize("field", ["input_type", "task", "prompt_name"])
def test_known_input_type_without_a_prompt_changes_nothing(service: Service, field: str, name: str) -> None:
    """The bundled model has no prompts: the usual names are accepted and do nothing."""
    assert embedding(service, **{field: name}) == embedding(service)


def test_unknown_input_type_lists_the_names(service: Service) -> None:
    """A name nobody knows is refused with those that are known."""
    response = service.embed("hello", input_type="poem")
    assert_error(response, 400, "invalid_value", param="input_type", phrase="'query', 'search_query'")


@pytest.mark.parametrize("field", ["truncate", "truncation"])
@pytest.mark.parametrize("value", [None, True, "END", "Start"])
def test_long_inputs_are_cut_and_counted_in_a_header(service: Service, field: str, value: Any) -> None:
    """Unless it is refused, an input that is too long is cut, and the answer tells how many were."""
    response = service.http.post("/v1/embeddings", json={"input": ["short", LONG], field: value})
    assert response.status_code == 200
    assert response.headers["x-truncated-inputs"] == "1"
    assert response.json()["usage"] == {"prompt_tokens": 3 + 256, "total_tokens": 3 + 256}


def test_nothing_cut_has_no_header(service: Service) -> None:
    """The header is there only where something was cut."""
    assert "x-truncated-inputs" not in service.embed("short").headers


@pytest.mark.parametrize("field", ["truncate", "truncation"])
@pytest.mark.parametrize("value", [False, "NONE", "none"])
def test_long_inputs_are_refused_on_request(service: Service, field: str, value: Any) -> None:
    """NONE and false refuse an input that is too long, and say which it was."""
    response = service.http.post("/v1/embeddings", json={"input": ["short", LONG], field: value})
    assert_error(response, 400, "context_length_exceeded", param="input")
    assert response.json()["error"]["message"] == "Invalid 'input[1]': maximum input length is 256 tokens."


def test_model_that_does_not_truncate_by_default(guarded: Service) -> None:
    """The operator may turn cutting off for a model; a request may turn it on again."""
    assert_error(guarded.embed(LONG, model="half"), 400, "context_length_exceeded", param="input")
    assert guarded.embed(LONG, model="half", truncate=True).headers["x-truncated-inputs"] == "1"


@pytest.mark.parametrize(
    ("value", "code"), [("LEFT", "invalid_value"), (1, "invalid_type"), ([], "invalid_type")]
)
def test_truncate_that_is_none_of_these(service: Service, value: Any, code: str) -> None:
    """Other values are refused with those that there are."""
    response = service.embed("hello", truncate=value)
    assert_error(
        response,
        400,
        code,
        param="truncate",
        phrase="Supported values: [true, false, 'NONE', 'START', 'END']",
    )


@pytest.mark.parametrize(("limit", "tokens"), [(-1, 256), (1, 1), (10, 10), (256, 256)])
def test_truncate_prompt_tokens_sets_a_lower_limit(service: Service, limit: int, tokens: int) -> None:
    """-1 is the model's own limit; smaller limits cut sooner."""
    response = service.embed(LONG, truncate_prompt_tokens=limit)
    assert response.json()["usage"]["prompt_tokens"] == tokens
    assert response.headers["x-truncated-inputs"] == "1"


@pytest.mark.parametrize(("limit", "code"), [(0, "invalid_value"), (-2, "invalid_value"), (257, "invalid_value"), ("5", "invalid_type"), (1.0, "invalid_type"), (True, "invalid_type")])  # fmt: skip
def test_truncate_prompt_tokens_outside_the_models_range(service: Service, limit: object, code: str) -> None:
    """Limits that the model cannot keep are refused."""
    assert_error(
        service.embed("hello", truncate_prompt_tokens=limit), 400, code, param="truncate_prompt_tokens"
    )


@pytest.mark.parametrize("field", ["normalize", "normalized"])
@pytest.mark.parametrize("value", ["true", 1, 0.0])
def test_normalize_takes_only_true_and_false(service: Service, field: str, value: Any) -> None:
    """What looks like a truth value but is none is refused."""
    assert_error(
        service.embed("hello", **{field: value}), 400, "invalid_type", param=field, phrase="[true, false]"
    )
