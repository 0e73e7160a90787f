"""Options, fixtures and scheduling for all tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.service import Service

if TYPE_CHECKING:
    from collections.abc import Iterator

# Torch reads this at import. Threads that spin while they wait would take CPU time from the other worker.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TESTS = Path(__file__).parent
LONGEST = (
    "compiler", "artifacts", "fidelity", "api", "docs", "benchmarks", "backends", "registry", "faults", "cli", "management", "container", "hubs",
)  # fmt: skip
"""Directories, the longest running first, so that both workers finish at about the same time."""
BOTH_BACKENDS = {
    TESTS / "api" / f"test_{name}.py": marks
    for names, marks in (
        (("openai_sdk", "values"), ()),
        (("fields", "inputs", "langchain", "models"), (pytest.mark.slow,)),
    )
    for name in names
}
"""Test modules of the contract, which also run with torch, with the marks of those tests."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        choices=["auto", "openvino", "torch"],
        help="EMB_PROVIDER_BACKEND of the services that tests start (default: auto; tests of the contract also torch)",
    )
    parser.addoption(
        "--fuzz-examples",
        type=int,
        help="approximate number of requests of tests/fuzz, different each time (default: a few, always the same)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that start a service with the requested backend, by default tests of the contract with both."""
    if "backend" not in metafunc.fixturenames:
        return
    backends: list[Any] = [metafunc.config.getoption("--backend") or "auto"]
    path = metafunc.definition.path
    # The strained service takes long to start. It is tested with torch only on request.
    if backends == ["auto"] and path in BOTH_BACKENDS and "strained" not in metafunc.fixturenames:
        backends.append(pytest.param("torch", marks=BOTH_BACKENDS[path]))
    metafunc.parametrize("backend", backends, indirect=True, scope="session")


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """Return the EMB_PROVIDER_BACKEND of the services that this test starts."""
    name: str = request.param
    return name


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
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
