"""Settings of the tests of engines."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True)
def short_collections(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collect only young objects when an engine starts and stops, because the imports of all tests are millions."""
    collect = gc.collect
    monkeypatch.setattr(gc, "collect", lambda: collect(0))
