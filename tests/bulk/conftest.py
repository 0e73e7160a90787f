"""A static model, whose vectors do not depend on batches, so that files can be compared byte by byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from sentence_transformers.sentence_transformer.modules import Normalize

from emb_model_provider import Embedder
from emb_model_provider.settings import Settings
from tests.models import save_static

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_static(tmp_path_factory.mktemp("bulk") / "model", Normalize())


@pytest.fixture(scope="session")
def settings(model: Path) -> Settings:
    return Settings.from_values(
        cache_dir=str(model.with_name("cache")),
        offline=True,
        model_mapping={"static": {"path": str(model), "dimensions": [8, 16]}},
    )


@pytest.fixture(scope="session")
def embedder(settings: Settings) -> Iterator[Embedder]:
    with Embedder(settings=settings) as embedder:
        yield embedder
