"""`GET /v1/models` and `/v1/models/{model}`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

from tests.api.helpers import MAPPING
from tests.service import BUNDLED, assert_error

if TYPE_CHECKING:
    from tests.service import Service


def test_list_has_openais_fields_and_ours(service: Service, backend: str) -> None:
    """The bundled model is listed with OpenAI's fields and with the fields of this service."""
    body = service.http.get("/v1/models").json()
    assert set(body) == {"object", "data"}
    assert body["object"] == "list"
    (model,) = body["data"]
    assert (model["id"], model["object"], model["owned_by"]) == (BUNDLED, "model", "sentence-transformers")
    assert isinstance(model["created"], int)
    assert 0 <= time.time() - model["created"] < 3600
    assert (model["state"], model["source"], model["error"]) == ("ready", "bundled", None)
    assert (model["dimensions"], model["max_input_tokens"], model["pooling"]) == (384, 256, "mean")
    assert (model["normalize"], model["supported_dimensions"], model["prompts"]) == (True, [], [])
    assert model["precision"] in ("fp32", "bf16")
    assert model["backend"] == backend or backend == "auto"


def test_aliases_are_listed_in_the_order_of_the_settings(guarded: Service) -> None:
    """Each alias is a model, loaded or not. The first is the default model."""
    models = guarded.http.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == list(MAPPING)
    by_id = {model["id"]: model for model in models}
    assert by_id["mini"]["name"] == BUNDLED
    assert by_id["mini"]["supported_dimensions"] == "any"
    assert by_id["mini"]["prompts"] == ["document", "query"]
    assert guarded.embed("x").json()["model"] == "mini"


@pytest.mark.parametrize("name", [BUNDLED, quote(BUNDLED, safe=""), "all-MiniLM-L6-v2"])
def test_model_is_found_by_each_of_its_names(service: Service, name: str) -> None:
    """An id is accepted with a slash or %2F, and so is its unique last part."""
    response = service.http.get(f"/v1/models/{name}")
    assert response.json() == service.http.get("/v1/models").json()["data"][0]


@pytest.mark.parametrize("name", ["nope", "sentence-transformers", "no/such/model", "%2e%2e%2fetc", "x" * 3000])
def test_unknown_model(service: Service, name: str) -> None:
    """The 404 for an unknown model names the served models."""
    response = service.http.get(f"/v1/models/{name}")
    assert_error(response, 404, "model_not_found", param="model", phrase=f"Served here: {BUNDLED}")
    assert len(response.content) < 1000


def test_failed_model_has_the_reason(strained: Service) -> None:
    """A model that failed to load is listed with its state and the reason."""
    model = strained.http.get("/v1/models/broken").json()
    assert model["state"] == "failed"
    assert "not-there" in model["error"]
    assert model["dimensions"] is None
