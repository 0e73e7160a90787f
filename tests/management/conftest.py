"""Fixtures of the manager's tests: two hubs' servers, settings that point to them, and a manager."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from emb_model_provider.management.manager import ModelManager
from emb_model_provider.settings import Settings
from tests.hubs.conftest import home, huggingface, modelscope  # noqa: F401 - fixtures
from tests.management.helpers import on_disk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.hubs.servers import HuggingFaceServer, ModelScopeServer


@pytest.fixture
def configured(
    tmp_path: Path,
    huggingface: HuggingFaceServer,  # noqa: F811 - a fixture
    modelscope: ModelScopeServer,  # noqa: F811 - a fixture
) -> Callable[..., Settings]:
    """Return a function that makes settings for the servers; keyword arguments take precedence."""

    def make(**changes: object) -> Settings:
        values = {
            "cache_dir": tmp_path / "cache",
            "hf_cache_dir": tmp_path / "hf",
            "hf_endpoint": huggingface.url,
            "modelscope_cache_dir": tmp_path / "ms",
            "modelscope_endpoint": modelscope.url,
        }
        return Settings.from_values(**values | changes)

    return make


@pytest.fixture
def manager(configured: Callable[..., Settings]) -> ModelManager:
    return ModelManager(configured())


@pytest.fixture
def empty(tmp_path: Path) -> dict[str, tuple[str, int]]:
    """Create the empty roots of the caches, which are never removed, and return what is on disk."""
    for name in ("cache", "hf", "ms"):
        (tmp_path / name).mkdir()
    return on_disk(tmp_path)
