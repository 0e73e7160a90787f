"""The doctor's checks of directories."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.cli.helpers import run_doctor

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", ["file/cache", "x" * 300], ids=["below a file", "name too long"])
def test_a_cache_that_is_not_writable_fails(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result names the directory and the setting. The other checks still run."""
    (here / "file").touch()
    monkeypatch.setenv("EMB_PROVIDER_CACHE_DIR", str(here / name))
    results = run_doctor(status=1)
    assert str(here / name) in results["cache"]["found"]
    assert "EMB_PROVIDER_CACHE_DIR" in results["cache"]["advice"]
    assert results["port"]["level"] == "ok"
