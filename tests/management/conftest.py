"""What the tests of the manager share: two hubs' servers, settings that point at them, and a look at the disk."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.management.manager import ModelManager
from emb_model_provider.settings import Settings
from tests.hubs.conftest import home, huggingface, modelscope  # noqa: F401 (fixtures)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.hubs.servers import HuggingFaceServer, ModelScopeServer


@pytest.fixture
def configured(
    tmp_path: Path,
    huggingface: HuggingFaceServer,  # noqa: F811 (a fixture)
    modelscope: ModelScopeServer,  # noqa: F811 (a fixture)
) -> Callable[..., Settings]:
    """Settings that point at the servers; keyword arguments win."""

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


def on_disk(directory: Path) -> dict[str, tuple[str, int]]:
    """Everything below a directory: what it is, and its size or where it points to."""
    found: dict[str, tuple[str, int]] = {}
    for parent, directories, names in os.walk(directory):
        for name in (*directories, *names):
            path = os.path.join(parent, name)  # noqa: PTH118 (os.walk gives strings)
            if os.path.islink(path):  # noqa: PTH114
                found[path] = (os.readlink(path), 0)  # noqa: PTH115
            elif name in names:
                found[path] = ("file", os.stat(path).st_size)  # noqa: PTH116
            else:
                found[path] = ("directory", 0)
    return found
