"""Compiled models, each compiled once per test run, and a preparer over a fake compiler."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.artifacts.helpers import FAMILY, CompiledModels, Harness, compiled_models

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> CompiledModels:
    return compiled_models(tmp_path_factory.getbasetemp())


@pytest.fixture
def harness(compiled: CompiledModels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Harness:
    return Harness(compiled(FAMILY), tmp_path, monkeypatch)
