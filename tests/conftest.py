"""What the tests of several packages share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.service import Service

if TYPE_CHECKING:
    from collections.abc import Iterator

# Read when torch is imported. Threads that spin while they wait would take the processor from the other workers.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TESTS = Path(__file__).parent
LONGEST = (
    "compiler", "artifacts", "fidelity", "api", "docs", "benchmarks", "backends", "registry", "faults", "cli", "management", "container", "hubs",
)  # fmt: skip
"""Directories, those first whose tests take longest."""
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


class _ByDirectory(LoadScopeScheduling):
    """Keeps the tests of a directory, or of a file beside the directories, on one worker: they share services."""

    def _split_scope(self, nodeid: str) -> str:
        return "/".join(nodeid.partition("::")[0].split("/")[:2])


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what takes longest, so that no worker is left alone with it in the end."""

    def place(item: pytest.Item) -> int:
        directory = item.path.relative_to(TESTS).parts[0]
        return LONGEST.index(directory) if directory in LONGEST else len(LONGEST)

    items.sort(key=place)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _ByDirectory:
    return _ByDirectory(config, log)


@pytest.fixture(scope="session")
def service_cache(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> str:
    """Return a cache directory, empty at first, that services share: compiling a model takes tens of seconds."""
    own = tmp_path_factory.getbasetemp()
    # Of several workers each has a directory of its own in the run's; the cache is for all of them.
    shared = (own if worker_id == "master" else own.parent) / "service-cache"
    shared.mkdir(exist_ok=True)
    return str(shared)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, service_cache: str, backend: str) -> Iterator[Service]:
    """Yield the service as it comes: no setting but a port, a cache of its own, and the backend."""
    with Service(tmp_path_factory.mktemp("service"), CACHE_DIR=service_cache, BACKEND=backend) as started:
        yield started.wait()
