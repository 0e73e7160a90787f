"""What the tests of several packages share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.service import Service

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def service_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a cache directory, empty at first, that services share: compiling a model takes tens of seconds."""
    return str(tmp_path_factory.mktemp("service-cache"))


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, service_cache: str) -> Iterator[Service]:
    """Yield the service as it comes: no setting but a port and a cache of its own."""
    with Service(tmp_path_factory.mktemp("service"), CACHE_DIR=service_cache) as started:
        yield started.wait()
