"""The fields of JSON request bodies: reading them, and checking their types."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from emb_model_provider.errors import RequestError
from emb_model_provider.formatting import quote
from emb_model_provider.json_parser import parse_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request

    from emb_model_provider.api.dependencies import Services
    from emb_model_provider.settings import LimitSettings

T = TypeVar("T", str, bool, int)

MAX_INLINE_BODY_BYTES = 256 * 1024
"""Larger request bodies are parsed on a thread, one at a time."""
_MAX_OPTION_CHARACTERS = 10_000
"""Longest value of a field that is a text, in characters. Inputs are not limited by it."""
_MAX_KEYWORD_CHARACTERS = 32
_TYPE_NAMES = {str: "a string", bool: "true, false", int: "an integer"}


async def read_fields(request: Request, services: Services) -> Mapping[str, Any]:
    """Return the fields of the JSON object in the body of a request."""
    body = await request.body()
    if len(body) > MAX_INLINE_BODY_BYTES:
        return await services.in_parse_thread(lambda: parse_object(body))
    return parse_object(body)


def read_texts(fields: Mapping[str, Any], name: str, limits: LimitSettings) -> list[str]:
    """Return the texts of a field: a string, or an array of strings or of objects with `text`."""
    value = require(fields, name)
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        supported = "an array of strings, or of objects with 'text'"
        raise unsupported_value(name, value, supported, code="invalid_type")
    if len(value) > limits.max_inputs:
        raise RequestError(
            f"'{name}' is invalid: array length must be {limits.max_inputs} or less", param=name, code="array_too_long"
        )
    texts = [item.get("text") if isinstance(item, dict) else item for item in value]
    strings = [text for text in texts if isinstance(text, str)]
    if not texts or len(strings) < len(texts):
        reason = "it must have at least one item, and each item must be a string, or an object with 'text'"
    elif limits.strict_input and "" in texts:
        reason = "an item is an empty string"
    else:
        return strings
    raise RequestError(f"'{name}' is invalid: {reason}.", param=name, code="invalid_input")


def require(fields: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field; raise RequestError if it is absent or null."""
    value = fields.get(name)
    if value is None:
        raise RequestError(f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter")
    return value


def parse_object(body: bytes) -> Mapping[str, Any]:
    """Return the fields of a JSON object; raise RequestError if the body is not one."""
    try:
        fields = parse_json(body)
    except ValueError:
        raise RequestError("We could not parse the JSON body of your request.", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise RequestError("The JSON body of your request must be an object.", code="invalid_json")
    return fields


def optional(fields: Mapping[str, Any], kind: type[T], *names: str) -> T | None:
    """Return the value of a field that can have several names and must have this type."""
    name, value = first(fields, *names)
    if isinstance(value, str) and len(value) > _MAX_OPTION_CHARACTERS:
        raise unsupported_value(name, value, f"{_TYPE_NAMES[kind]}, of at most {_MAX_OPTION_CHARACTERS} characters")
    if value is None or type(value) is kind:  # not isinstance, because a bool is an int
        return value
    raise unsupported_value(name, value, _TYPE_NAMES[kind], code="invalid_type")


def count(fields: Mapping[str, Any], *names: str) -> int | None:
    """Return the value of a field that must be a positive integer."""
    value = optional(fields, int, *names)
    if value is not None and value < 1:
        raise unsupported_value(first(fields, *names)[0], value, "1 or more")
    return value


def flag(fields: Mapping[str, Any], *names: str) -> bool | None:
    """Return the value of a field that must be true or false, also as a text, as some clients send it."""
    name, value = first(fields, *names)
    if value is None or isinstance(value, bool):
        return value
    match folded(value) if isinstance(value, str) else value:
        case "true":
            return True
        case "false":
            return False
    raise unsupported_value(name, value, _TYPE_NAMES[bool], code="invalid_type")


def first(fields: Mapping[str, Any], *names: str) -> tuple[str, Any]:
    """Return the first of a field's names that is present and not null, with its value."""
    for name in names:
        value = fields.get(name)
        if value is not None:
            return name, value
    return names[0], None


def unsupported_value(name: str, value: object, supported: str, *, code: str = "invalid_value") -> RequestError:
    return RequestError(
        f"Invalid value for '{name}' = {quote(value)}. Supported values: [{supported}].", param=name, code=code
    )


def folded(text: str) -> str:
    """Return a keyword in lower case, and a text that is too long for one as it is."""
    return text.lower() if len(text) < _MAX_KEYWORD_CHARACTERS else text
