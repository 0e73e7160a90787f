"""load_model_and_tokenizer, with the real torch backend."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest
import torch

from emb_model_provider.errors import ModelInUseError, UnsupportedPrecisionError
from tests.models import gte_configuration, reference_bert, save_modelscope

if TYPE_CHECKING:
    from pathlib import Path

    from emb_model_provider.management.manager import ModelManager
    from tests.hubs.servers import ModelScopeServer

REPO = "iic/gte"
TEXT = "a small model"


@pytest.fixture
def gte(modelscope: ModelScopeServer, tmp_path: Path) -> Path:
    """Return a GTE model without modules.json and with cls pooling, which is on the server, too."""
    directory = save_modelscope(tmp_path / "gte", gte_configuration(emb_pooler_type="cls", normalize=False))
    modelscope.repos[REPO] = {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }
    return directory


def test_modelscope_model_has_its_own_pooling_and_is_kept_while_it_is_used(manager: ModelManager, gte: Path) -> None:
    """The vector is that of the first token, as the configuration declares."""
    model, tokenizer = manager.load_model_and_tokenizer(REPO)
    with torch.no_grad():
        states = reference_bert(gte)(**tokenizer([TEXT], return_tensors="pt")).last_hidden_state
    expected = states[:, 0]
    torch.testing.assert_close(model.encode([TEXT], convert_to_tensor=True), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, states.mean(1), atol=1e-3)
    with pytest.raises(ModelInUseError):
        manager.evict_model(REPO)
    del model, tokenizer
    gc.collect()
    manager.evict_model(REPO)
    assert not manager.list()


def test_precision_of_compiled_models_is_rejected(manager: ModelManager) -> None:
    """The error names the class that supports int8, and nothing is downloaded."""
    with pytest.raises(UnsupportedPrecisionError, match="Embedder"):
        manager.load_model_and_tokenizer(REPO, precision="int8")
    assert not manager.list()
