"""The service as an application of Ray Serve, with Ray on this machine. `test_benchmark.py` has several nodes, and faults."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.docs.markdown import ROOT
from tests.service import free_port

if TYPE_CHECKING:
    from tests.clients.isolated import Environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(ray: Environment) -> dict[str, Any]:
    return ray.run("serving", port=free_port(), configuration=str(ROOT / "deploy" / "ray" / "serve.yaml"))


def test_the_example_of_a_configuration_is_valid(served: dict[str, Any]) -> None:
    assert (served["configuration"]["num_cpus"], served["configuration"]["max_replicas"]) == (4, 10)


def test_replicas_serve_after_their_models_are_loaded(served: dict[str, Any]) -> None:
    """All routes exist, except those that change one replica, which no client may use without a key."""
    assert served["ready"] == [200, "ready"]
    assert served["management"] == 401
    assert served["console"] == 404


def test_access_rules_and_metrics_apply_below_a_prefix(served: dict[str, Any]) -> None:
    """The application has a `route_prefix`, also in the tests above."""
    assert served["embeddings"] == 200
    (requests,) = served["requests"]
    assert requests.endswith('status="200"} 1.0')
