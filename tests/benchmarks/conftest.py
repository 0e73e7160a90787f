"""Gives the benchmarks a cache directory that ends with the tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import CACHE


@pytest.fixture(autouse=True)
def cache(service_cache: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the benchmarks use the compiled models of the other tests, because compiling takes tens of seconds."""
    home = tmp_path_factory.getbasetemp() / "benchmarks"
    service = home / CACHE.name / "service"
    if not service.is_symlink():
        service.parent.mkdir(parents=True)
        service.symlink_to(Path(service_cache), target_is_directory=True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
