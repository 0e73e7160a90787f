"""The OpenAPI document as short lines, so that changes of the API are visible in a diff.

Run `uv run python -m tests.api.openapi_outline` to update tests/data/openapi.txt after an intended change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emb_model_provider.api.app import create_app
from emb_model_provider.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Iterator

PATH = Path(__file__).parents[1] / "data" / "openapi.txt"

_ERROR = '{"application/json": {"schema": {"$ref": "#ErrorResponse"}}}'


def create_document() -> dict[str, Any]:
    """Return the OpenAPI document of a service with default settings."""
    return create_app(Settings.from_values(), on_nothing_to_serve=lambda: None).openapi()


def outline(document: dict[str, Any]) -> str:
    """Return all of an OpenAPI document except its descriptions, with a line for each parameter, response and property."""
    return "".join(f"{line}\n" for line in _lines(document))


def _lines(document: dict[str, Any]) -> Iterator[str]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield f"{method.upper()} {path} {operation['operationId']} {','.join(operation['tags'])}"
            for parameter in operation.get("parameters", ()):
                required = "*" if parameter["required"] else ""
                yield f"    {parameter['in']} {parameter['name']}{required} {_compact(parameter['schema'])}"
            if "requestBody" in operation:
                yield f"    body {_compact(operation['requestBody'])}"
            contents = {
                status: _compact(response.get("content", {})) for status, response in operation["responses"].items()
            }
            yield from (f"    {status} {content}" for status, content in contents.items() if content != _ERROR)
            if errors := [status for status, content in contents.items() if content == _ERROR]:
                yield f"    errors {' '.join(errors)}"
    for name, schema in sorted(document["components"]["schemas"].items()):
        rest = {key: value for key, value in schema.items() if key not in ("properties", "required", "title")}
        yield f"{name} {_compact(rest)}"
        for field, value in schema["properties"].items():
            required = "*" if field in schema.get("required", ()) else ""
            yield f"    {field}{required} {_compact(value)}"


def _compact(schema: dict[str, Any]) -> str:
    return json.dumps(_strip(schema), ensure_ascii=False, sort_keys=True).replace("#/components/schemas/", "#")


def _strip(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strip(each) for key, each in value.items() if key not in ("description", "title")}
    return [_strip(each) for each in value] if isinstance(value, list) else value


if __name__ == "__main__":
    PATH.write_text(outline(create_document()), encoding="utf-8")
