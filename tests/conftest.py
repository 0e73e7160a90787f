"""Options, fixtures and scheduling for all tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.service import Service

if TYPE_CHECKING:
    from collections.abc import Iterator

# Torch reads this at import. Threads that spin while they wait would take CPU time from the other worker.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TESTS = Path(__file__).parent
LONGEST = (
    "compile", "api", "docs", "benchmarks", "backends", "registry", "faults", "cli", "management", "container", "hubs",
)  # fmt: skip
"""Directories, the longest running first, so that both workers finish at about the same time."""
CONTRACT = frozenset(
    TESTS / "api" / f"test_{name}.py"
    for name in ("fields", "inputs", "langchain", "models_routes", "openai_sdk", "values")
)
"""What a request may say and what its answer is: tested with both backends wherever tests are run."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=["auto", "openvino", "torch"],
        help="EMB_PROVIDER_BACKEND of the services that tests start (default: auto, and torch too for most of the contract)",
    )
    parser.addoption(
        "--fuzz-examples",
        type=int,
        help="about how many requests tests/fuzz makes, other ones each time (default: 240, always the same)",
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests of a directory in one worker, because they share services; start with the longest."""

    def directory(item: pytest.Item) -> str:
        return item.path.relative_to(TESTS).parts[0]

    for item in items:
        item.add_marker(pytest.mark.xdist_group(directory(item)))
    items.sort(key=lambda item: LONGEST.index(directory(item)) if directory(item) in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def service_cache(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> str:
    """Return a cache directory that all services share, because compiling a model takes tens of seconds."""
    base = tmp_path_factory.getbasetemp()  # of this worker; its parent belongs to all workers
    shared = (base if worker_id == "master" else base.parent) / "service-cache"
    shared.mkdir(exist_ok=True)
    return str(shared)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, service_cache: str, backend: str) -> Iterator[Service]:
    """Yield a service with default settings, except for the port, the cache directory and the backend."""
    with Service(tmp_path_factory.mktemp("service"), CACHE_DIR=service_cache, BACKEND=backend) as started:
        yield started.wait()
