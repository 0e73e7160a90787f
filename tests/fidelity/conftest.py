"""Compiled models, each compiled once per test run."""

from __future__ import annotations

import pytest

from tests.artifacts.helpers import CompiledModels, compiled_models


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> CompiledModels:
    return compiled_models(tmp_path_factory.getbasetemp())
