"""Options, fixtures and scheduling for all tests."""

from __future__ import annotations

import gc
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from tests.service import Service

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tiktoken import Encoding

# Torch reads this at import. Threads that spin while they wait would take CPU time from the other worker.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# The tests start hundreds of processes. Without cached bytecode, each of them compiles all its imports again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

TESTS = Path(__file__).parent
FIRST = (
    "compiler",
    "api",
    "clients",
    "serving",
    "hubs",
    "management",
    "faults",
    "transfer",
    "cli",
    "process",
    "backends",
    "artifacts",
    "registry",
)
"""Directories, mostly the longest running first, so that both workers finish at about the same time.

serving, hubs and management start no service, which would wait until the services of api have compiled the model.
"""
SHARE_SERVICES = {"deploy": "api", "docs": "api", "fuzz": "api", "observability": "api"}
"""Directories that run with another one, because their tests use the same services."""
CONTRACT = {
    TESTS / "api" / f"test_{name}.py" for name in ("fields", "inputs", "langchain", "models", "openai_sdk", "values")
}
"""Test modules of the contract, which `pytest -m slow` also runs with torch."""


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
    """Run tests that start a service with the requested backend, and tests of the contract also with torch."""
    if "backend" not in metafunc.fixturenames:
        return
    backends: list[Any] = [metafunc.config.getoption("--backend") or "auto"]
    path = metafunc.definition.path
    # The strained service takes long to start. It is tested with torch only on request.
    if backends == ["auto"] and path in CONTRACT and "strained" not in metafunc.fixturenames:
        backends.append(pytest.param("torch", marks=pytest.mark.slow))
    metafunc.parametrize("backend", backends, indirect=True, scope="session")


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> str:
    """Return the EMB_PROVIDER_BACKEND of the services that this test starts."""
    name: str = request.param
    return name


def group(nodeid: str) -> str:
    """Return the directory of a test, or the directory that it shares services with. Both run in one worker."""
    directory = nodeid.partition("::")[0].split("/")[1]
    return SHARE_SERVICES.get(directory, directory)


class DirectoryScheduling(LoadScopeScheduling):
    """Runs all tests of a directory in one worker, because they share services and compiled models."""

    def _split_scope(self, nodeid: str) -> str:
        return group(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> DirectoryScheduling:
    return DirectoryScheduling(config, log)


@pytest.hookimpl(trylast=True)  # after pytest has ordered the tests by their parameters
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the directories into the order of `FIRST`."""
    ranks = {name: rank for rank, name in enumerate(FIRST)}
    items.sort(key=lambda item: ranks.get(group(item.nodeid), len(FIRST)))


@pytest.fixture
def short_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collect only young objects when an engine starts and stops, because the imports have millions."""
    collect = gc.collect
    monkeypatch.setattr(gc, "collect", lambda: collect(0))


@pytest.fixture(scope="session")
def tiktoken_cache() -> str:
    """Return a directory with the vocabularies of tiktoken, which it would download: that of LlamaIndex."""
    spec = importlib.util.find_spec("llama_index.core")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "_static" / "tiktoken_cache")


@pytest.fixture
def tiktoken_cl100k(tiktoken_cache: str, monkeypatch: pytest.MonkeyPatch) -> Encoding:
    """Return OpenAI's tokenizer. In the same test, clients also find its vocabulary."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", tiktoken_cache)
    import tiktoken

    return tiktoken.get_encoding("cl100k_base")


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
