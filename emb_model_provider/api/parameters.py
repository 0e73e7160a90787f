"""Parameters of the management routes: in the query, or as a JSON object in the body, or some in each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Depends
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from emb_model_provider.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

P = TypeVar("P", bound=BaseModel)


def from_query_or_body(model: type[P]) -> Any:
    """Return the dependency of a route that takes the parameters of a model. Document them with `documented`.

    Raises:
        RequestValidationError: A parameter is missing, unknown or invalid.
        RequestError: The body is not a JSON object, or a parameter has another value in the query.
    """

    async def read(request: Request) -> P:
        sent = request.query_params
        # A parameter that is sent several times has the wrong type.
        query: dict[str, Any] = {name: values[0] if len(values := sent.getlist(name)) == 1 else values for name in sent}
        body = _parse(await request.body())
        for name in query.keys() & body.keys():
            if query[name] != body[name]:
                raise RequestError(f"'{name}' is in the query and in the body. Send it once.", param=name)
        try:
            return model.model_validate({**query, **body})
        except ValidationError as error:
            # In the form of FastAPI's own errors.
            raise RequestValidationError(error.errors(include_url=False)) from None

    dependency: Callable[[Request], Awaitable[P]] = read
    return Depends(dependency)


def documented(model: type[BaseModel]) -> dict[str, Any]:
    """Return what the OpenAPI document says about the parameters of a model."""
    schema = model.model_json_schema()
    parameters = [
        {
            "in": "query",
            "name": name,
            # Of those that are required, each can be in the body instead.
            "required": False,
            "schema": {key: value for key, value in field.items() if key != "description"},
            "description": field.get("description", ""),
        }
        for name, field in schema["properties"].items()
    ]
    body = {"required": False, "content": {"application/json": {"schema": schema}}}
    return {"parameters": parameters, "requestBody": body}


def _parse(body: bytes) -> Mapping[str, Any]:
    if not body.strip():
        return {}
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise RequestError(
            'The body must be a JSON object such as {"model_name": "owner/name"}, or empty if the parameters are in the query.'
        )
    # Null means the default, as in other APIs.
    return {name: each for name, each in value.items() if each is not None}
