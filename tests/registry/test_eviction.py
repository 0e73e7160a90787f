"""Eviction and unloading in a running service: all requests are answered, and the metrics are correct."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.service import BUNDLED, Service, assert_error, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx

ALIASES = ("one", "two", "three")
MAPPING = json.dumps({alias: {"name": BUNDLED, "dimensions": [size]} for size, alias in enumerate(ALIASES, 1)})
"""Three models, because their settings differ."""
EVICTED = "room for another model"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, service_cache: str) -> Iterator[Service]:
    """Yield a service of three models, of which one can be loaded at a time."""
    with Service(
        tmp_path_factory.mktemp("narrow"), CACHE_DIR=service_cache, MODEL_MAPPING=MAPPING, MAX_LOADED_MODELS="1"
    ) as started:
        yield started.wait()


def states(service: Service) -> dict[str, str]:
    return {model["id"]: model["state"] for model in service.http.get("/v1/models").json()["data"]}


def vector(response: httpx.Response) -> list[float]:
    assert response.status_code == 200, response.text
    embedding: list[float] = response.json()["data"][0]["embedding"]
    return embedding


@pytest.mark.slow
def test_all_requests_are_answered_while_models_evict_each_other(narrow: Service) -> None:
    """Concurrent requests for three models, of which one can be loaded: none fails, and each vector is correct."""
    assert states(narrow) == {"one": "ready", "two": "unloaded", "three": "unloaded"}
    expected = vector(narrow.embed("hello", model="one"))

    def request(turn: int) -> list[list[float]]:
        return [vector(narrow.embed("hello", model=ALIASES[(turn + step) % 3])) for step in range(4)]

    with ThreadPoolExecutor(6) as pool:
        actual = [vector for vectors in pool.map(request, range(6)) for vector in vectors]
    np.testing.assert_allclose(actual, np.tile(expected, (24, 1)), atol=1e-6)
    assert narrow.figure("emb_provider_model_unloads_total", reason=EVICTED) >= 2
    assert sum(state == "ready" for state in states(narrow).values()) == 1


def test_evicted_model_does_not_make_the_service_unready(narrow: Service) -> None:
    """A preloaded model that was evicted is loaded again by its next request, so `/ready` is 200."""
    vector(narrow.embed("hello", model="two"))
    assert states(narrow)["one"] == "unloaded"
    assert narrow.http.get("/ready").status_code == 200


def test_memory_of_loaded_models_is_reported(narrow: Service) -> None:
    """`/v1/models` and the gauge report the memory of the loaded model, and none for the others."""
    vector(narrow.embed("hello", model="three"))
    models = {model["id"]: model["memory_bytes"] for model in narrow.http.get("/v1/models").json()["data"]}
    assert (models["one"], models["two"]) == (None, None)
    # The weights are 23 million numbers of two or four bytes.
    assert 40 * 2**20 < models["three"] < 600 * 2**20
    for alias, memory_bytes in models.items():
        assert narrow.figure("emb_provider_model_memory_bytes", model=alias) == (memory_bytes or 0)


@pytest.mark.slow
def test_load_wait_and_idle_unload(tmp_path_factory: pytest.TempPathFactory, service_cache: str) -> None:
    """With LOAD_WAIT_S=0 a request does not wait for its load. With IDLE_UNLOAD_S the model is unloaded later."""
    settings = {"MODEL_MAPPING": MAPPING, "PRELOAD_MODELS": "none", "LOAD_WAIT_S": "0", "IDLE_UNLOAD_S": "1"}
    with Service(tmp_path_factory.mktemp("idle"), CACHE_DIR=service_cache, **settings) as service:
        service.wait()
        early = service.embed("hello", model="two")
        assert_error(early, 503, "model_not_ready", type="server_error", param="model", phrase="Try again later")
        assert 1 <= int(early.headers["retry-after"]) <= 120
        wait_until(lambda: service.embed("hello", model="two").status_code == 200)
        wait_until(lambda: states(service)["two"] == "unloaded")
        assert service.figure("emb_provider_model_unloads_total", model="two", reason="idle") >= 1
        wait_until(lambda: service.embed("hello", model="two").status_code == 200)
