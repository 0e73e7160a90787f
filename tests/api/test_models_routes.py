"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING
from urllib.parse import quote

import pytest

from tests.api.models import MAPPING
from tests.service import BUNDLED, assert_error

if TYPE_CHECKING:
    from tests.service import Service


def test_list_has_openais_fields_and_ours(service: Service, backend: str) -> None:
    """The bundled model is listed with what OpenAI says of a model, and with what is known of this one."""
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
    """Every alias is a model of its own, loaded or not; the first is the default."""
    models = guarded.http.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == list(MAPPING)
    by_id = {model["id"]: model for model in models}
    assert by_id["mini"]["name"] == BUNDLED
    assert by_id["mini"]["supported_dimensions"] == "any"
    assert by_id["mini"]["prompts"] == ["document", "query"]
    assert guarded.embed("x").json()["model"] == "mini"


@pytest.mark.parametrize("name", [BUNDLED, quote(BUNDLED, safe=""), "all-MiniLM-L6-v2"])
def test_one_model_by_any_of_its_names(service: Service, name: str) -> None:
    """An id's slash may be sent as it is or as %2F, and the unique last part will do."""
    response = service.http.get(f"/v1/models/{name}")
    assert response.json() == service.http.get("/v1/models").json()["data"][0]


@pytest.mark.parametrize(
    "name", ["nope", "sentence-transformers", "no/such/model", "%2e%2e%2fetc", "x" * 3000]
)
def test_unknown_model(service: Service, name: str) -> None:
    """A model that is not served is a 404 that names those that are."""
    response = service.http.get(f"/v1/models/{name}")
    assert_error(response, 404, "model_not_found", param="model", phrase=f"Served here: {BUNDLED}")
    assert len(response.content) < 1000


def test_failed_model_says_why(strained: Service) -> None:
    """A model that could not be loaded is listed with its state and the reason."""
    model = strained.http.get("/v1/models/broken").json()
    assert model["state"] == "failed"
    assert "not-there" in model["error"]
    assert model["dimensions"] is None
