"""The service as an application of Ray Serve, with Ray on this machine."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from sentence_transformers.sentence_transformer.modules import Normalize

from emb_model_provider import Embedder
from emb_model_provider.settings import Settings
from tests.docs.markdown import ROOT
from tests.models import save_static
from tests.service import BUNDLED, free_port

if TYPE_CHECKING:
    from tests.clients.isolated import Environment

pytestmark = pytest.mark.slow

TEXTS = [f"the quick brown fox {number}" for number in range(8)]


@pytest.fixture(scope="module")
def served(ray: Environment, tmp_path_factory: pytest.TempPathFactory, service_cache: str) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("serving")
    model = save_static(directory / "model", Normalize())
    mapping = {"static": {"path": str(model)}}
    settings = Settings.from_values(cache_dir=str(directory / "cache"), offline=True, model_mapping=mapping)
    with Embedder(settings=settings) as embedder:
        vectors = embedder.embed(TEXTS).tolist()
    variables = {"EMB_PROVIDER_CACHE_DIR": str(directory / "cache"), "EMB_PROVIDER_MODEL_MAPPING": json.dumps(mapping)}
    return ray.run(
        "serving",
        port=free_port(),
        expected=dict(zip(TEXTS, vectors, strict=True)),
        variables=variables,
        # Which the fixture `ray` has compiled.
        slow_variables={"EMB_PROVIDER_CACHE_DIR": service_cache},
        slow_model=BUNDLED,
        configuration=str(ROOT / "deploy" / "ray" / "serve.yaml"),
    )


def test_the_example_of_a_configuration_is_valid(served: dict[str, Any]) -> None:
    assert (served["configuration"]["num_cpus"], served["configuration"]["max_replicas"]) == (4, 10)


def test_replicas_serve_after_their_models_are_loaded(served: dict[str, Any]) -> None:
    """All routes exist, except those that change one replica, which no client may use without a key."""
    assert served["ready"] == [200, "ready"]
    assert served["management"] == 401
    assert served["console"] == 404


def test_a_killed_replica_is_replaced_without_an_error(served: dict[str, Any]) -> None:
    """With the retries of the SDK, all requests are answered with the right vectors."""
    assert served["kill"] == []


def test_a_rolling_deploy_fails_no_request(served: dict[str, Any]) -> None:
    """Without retries."""
    assert served["deploy"] == []


def test_waiting_tokens_start_a_further_replica(served: dict[str, Any]) -> None:
    """In an application of its own, below another path."""
    assert (served["before"], served["scaled"]) == (1, [])
