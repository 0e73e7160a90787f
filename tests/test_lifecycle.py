"""Models come and go in a running service, and its clients notice nothing but time."""

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
MAPPING = json.dumps({alias: {"name": BUNDLED} for alias in ALIASES})
ROOM = "room for another model"


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, service_cache: str) -> Iterator[Service]:
    """Yield a service of three models with room for one."""
    with Service(
        tmp_path_factory.mktemp("narrow"),
        CACHE_DIR=service_cache,
        MODEL_MAPPING=MAPPING,
        MAX_LOADED_MODELS="1",
    ) as started:
        yield started.wait()


def states(service: Service) -> dict[str, str]:
    return {model["id"]: model["state"] for model in service.http.get("/v1/models").json()["data"]}


def vector(response: httpx.Response) -> list[float]:
    assert response.status_code == 200, response.text
    found: list[float] = response.json()["data"][0]["embedding"]
    return found


def test_more_models_than_there_is_room_for_all_answer(narrow: Service) -> None:
    """Three models take turns in one place while all are asked at once: no request fails, each vector is right."""
    assert states(narrow) == {"one": "ready", "two": "unloaded", "three": "unloaded"}
    expected = vector(narrow.embed("hello", model="one"))

    def ask(turn: int) -> list[list[float]]:
        return [vector(narrow.embed("hello", model=ALIASES[(turn + step) % 3])) for step in range(4)]

    with ThreadPoolExecutor(6) as pool:
        found = [one for answers in pool.map(ask, range(6)) for one in answers]
    np.testing.assert_allclose(found, np.tile(expected, (24, 1)), atol=1e-6)
    assert narrow.figure("emb_provider_model_unloads_total", reason=ROOM) >= 2
    assert sum(state == "ready" for state in states(narrow).values()) == 1


def test_model_that_made_room_is_no_reason_to_be_unready(narrow: Service) -> None:
    """`/ready` is about what cannot be had: a preloaded model that left for another comes back when it is asked."""
    vector(narrow.embed("hello", model="two"))
    assert states(narrow)["one"] == "unloaded"
    assert narrow.http.get("/ready").status_code == 200


def test_memory_is_that_of_the_models_that_are_loaded(narrow: Service) -> None:
    """`/v1/models` and the gauge say the same: what the loaded one takes, and nothing for the others."""
    vector(narrow.embed("hello", model="three"))
    models = {model["id"]: model["memory_bytes"] for model in narrow.http.get("/v1/models").json()["data"]}
    assert (models["one"], models["two"]) == (None, None)
    # The weights alone are 23 million numbers, of two bytes or four.
    assert 40 * 2**20 < models["three"] < 600 * 2**20
    for alias, taken in models.items():
        assert narrow.figure("emb_provider_model_memory_bytes", model=alias) == (taken or 0)


def test_impatient_requests_and_idle_models(
    tmp_path_factory: pytest.TempPathFactory, service_cache: str
) -> None:
    """With LOAD_WAIT_S=0 nobody waits for a model, and it is loaded all the same; unused, it leaves again."""
    settings = {"MODEL_MAPPING": MAPPING, "PRELOAD_MODELS": "none", "LOAD_WAIT_S": "0", "IDLE_UNLOAD_S": "1"}
    with Service(tmp_path_factory.mktemp("idle"), CACHE_DIR=service_cache, **settings) as service:
        service.wait()
        early = service.embed("hello", model="two")
        assert_error(
            early, 503, "model_not_ready", type="server_error", param="model", phrase="ask again later"
        )
        assert 1 <= int(early.headers["retry-after"]) <= 120
        wait_until(lambda: service.embed("hello", model="two").status_code == 200)
        wait_until(lambda: states(service)["two"] == "unloaded")
        assert service.figure("emb_provider_model_unloads_total", model="two", reason="idle") >= 1
        wait_until(lambda: service.embed("hello", model="two").status_code == 200)
