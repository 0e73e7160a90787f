"""What the tests of several packages share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.service import Service

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTRACT = frozenset(
    Path(__file__).parent / "api" / f"test_{name}.py"
    for name in ("fields", "inputs", "langchain", "models_routes", "openai_sdk", "values")
)
"""What a request may say and what its answer is: tested with both backends wherever tests are run."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=["auto", "openvino", "torch"],
        help="EMB_PROVIDER_BACKEND of the services that tests start (default: auto, and torch too for most of the contract)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that start a service with the backend that is asked for, or those of the contract with both."""
    if "backend" not in metafunc.fixturenames:
        return
    asked = metafunc.config.getoption("--backend")
    # Overload, and models that fail, take their time: with torch only where it is asked for.
    both = metafunc.definition.path in CONTRACT and "strained" not in metafunc.fixturenames
    backends = [asked] if asked else ["auto", "torch"] if both else ["auto"]
    metafunc.parametrize("backend", backends, indirect=True, scope="session")


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """Return the EMB_PROVIDER_BACKEND of the services that this test starts."""
    asked: str = request.param
    return asked


@pytest.fixture(scope="session")
def service_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a cache directory, empty at first, that services share: compiling a model takes tens of seconds."""
    return str(tmp_path_factory.mktemp("service-cache"))


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, service_cache: str, backend: str) -> Iterator[Service]:
    """Yield the service as it comes: no setting but a port, a cache of its own, and the backend."""
    with Service(tmp_path_factory.mktemp("service"), CACHE_DIR=service_cache, BACKEND=backend) as started:
        yield started.wait()
