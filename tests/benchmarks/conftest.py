"""Benchmarks keep what they need in the user's cache; here in one that ends with the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.cache import CACHE


@pytest.fixture(autouse=True)
def cache(
    service_cache: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Give benchmarks the artifacts of the other tests' services: compiling takes tens of seconds."""
    home = tmp_path_factory.getbasetemp() / "benchmarks"
    service = home / CACHE.name / "service"
    if not service.is_symlink():
        service.parent.mkdir(parents=True)
        service.symlink_to(Path(service_cache), target_is_directory=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
