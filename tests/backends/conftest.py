"""Directories of small models, each written once per test run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.models import FAMILIES

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="session")
def family_directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function from the name of a family to its directory."""
    root = tmp_path_factory.mktemp("families")

    def directory(name: str) -> Path:
        path = root / name
        if not path.exists():
            FAMILIES[name](path)
        return path

    return directory
