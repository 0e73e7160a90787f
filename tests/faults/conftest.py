"""Services with planted faults, shared by the tests of a module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.faults.harness import FaultyService

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    Start = Callable[..., FaultyService]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, service_cache: str, backend: str) -> Iterator[Start]:
    """Return a function that starts a service with these settings and waits until it is ready."""
    started: list[FaultyService] = []

    def begin(**settings: Any) -> FaultyService:
        directory = tmp_path_factory.mktemp("faulty")
        service = FaultyService(directory, CACHE_DIR=service_cache, BACKEND=backend, **settings)
        started.append(service)
        service.wait()
        return service

    yield begin
    for service in started:
        service.__exit__(None, None, None)
