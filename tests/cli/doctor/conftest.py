"""Fixtures of the doctor's tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.service import free_port

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def port(here: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return a free port, which is that of the settings."""
    port = free_port()
    monkeypatch.setenv("EMB_PROVIDER_PORT", str(port))
    return port
