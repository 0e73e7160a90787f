"""Models that need other repositories: an adapter with its base model, and a model with code in another repository."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import HubError, ModelInUseError
from emb_model_provider.management.manager import ModelManager
from emb_model_provider.model_resolver import resolve_model
from tests.hubs.conftest import HF_REPO, MS_REPO, modelscope_files
from tests.hubs.test_dependencies import CODE, CODE_FILES, LORA, adapter_files, coded_files
from tests.management.test_artifacts import add_artifact, artifact_keys

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.settings import Settings
    from tests.hubs.servers import HuggingFaceServer, ModelScopeServer


@pytest.fixture(autouse=True)
def adapter(huggingface: HuggingFaceServer) -> None:
    """Add an adapter for the model of the hub to it."""
    huggingface.repos[LORA] = adapter_files(HF_REPO)


def test_base_model_in_use_is_not_removed(configured: Callable[..., Settings], manager: ModelManager) -> None:
    """It is in use as long as its adapter is."""
    snapshot, lock = manager.acquire(resolve_model(configured(), LORA))
    assert snapshot.dependency(HF_REPO) is not None
    for name in (HF_REPO, LORA):
        with pytest.raises(ModelInUseError):
            manager.remove(name)
    assert [model.in_use for model in manager.list()] == [True, True]
    lock.release()
    assert [model.model_name for model in manager.remove(HF_REPO).models] == [HF_REPO]
    assert [model.model_name for model in manager.list()] == [LORA]
    with manager.acquire(resolve_model(configured(), LORA))[1]:
        assert [model.model_name for model in manager.list()] == [LORA, HF_REPO]


def test_adapter_is_not_ready_without_its_base_model(
    configured: Callable[..., Settings], manager: ModelManager, huggingface: HuggingFaceServer
) -> None:
    del huggingface.repos[HF_REPO]
    with pytest.raises(HubError, match=f"{LORA} needs the base model from {HF_REPO}"):
        manager.ensure(resolve_model(configured(), LORA))


def test_adapter_and_its_base_model_are_listed_and_verified(
    configured: Callable[..., Settings], manager: ModelManager
) -> None:
    snapshot = manager.ensure(resolve_model(configured(), LORA))
    assert [(model.model_name, model.state) for model in manager.list()] == [(LORA, "complete"), (HF_REPO, "complete")]
    assert [manager.verify(model).ok for model in manager.list()] == [True, True]
    (model,) = manager.find(LORA)
    assert [file.path for file in manager.inspect(model).files] == [file.path for file in snapshot.files]


def test_wrong_file_of_the_base_model_is_downloaded_again(
    configured: Callable[..., Settings], manager: ModelManager, huggingface: HuggingFaceServer
) -> None:
    snapshot = manager.ensure(resolve_model(configured(), LORA))
    base = snapshot.dependency(HF_REPO)
    assert base is not None
    (base.path / "model.safetensors").resolve().write_bytes(b"wrong")
    huggingface.forget()
    again, lock = manager.acquire(resolve_model(configured(), LORA))
    with lock:
        assert again == snapshot
    assert dict(huggingface.bodies()) == {"model.safetensors": 1}


def test_artifact_of_an_adapter_belongs_to_the_adapter(
    configured: Callable[..., Settings], manager: ModelManager, tmp_path: Path
) -> None:
    """Its digest covers the base model. It is kept by `prune`, and removed with the adapter."""
    snapshot = manager.ensure(resolve_model(configured(), LORA))
    key = add_artifact(tmp_path / "cache", snapshot.digest)
    assert manager.prune().artifacts == []
    lora, base = manager.list()
    assert [artifact.key for artifact in lora.artifacts] == [key]
    assert base.artifacts == []
    assert manager.inspect(lora).max_tokens == 128
    assert manager.remove(HF_REPO).artifacts == []
    assert manager.remove(LORA).artifacts == [key]
    assert artifact_keys(tmp_path / "cache") == []


def test_artifact_of_another_base_model_is_pruned(
    configured: Callable[..., Settings], manager: ModelManager, huggingface: HuggingFaceServer, tmp_path: Path
) -> None:
    snapshot = manager.ensure(resolve_model(configured(), LORA))
    key = add_artifact(tmp_path / "cache", snapshot.digest)
    huggingface.repos[HF_REPO]["tokenizer.json"] = b'{"version": "2.0"}'
    manager.ensure(resolve_model(configured(), LORA), force=True)
    assert manager.prune().artifacts == [key]


def test_code_is_fetched_if_the_settings_allow_it(
    configured: Callable[..., Settings], huggingface: HuggingFaceServer
) -> None:
    huggingface.repos |= {HF_REPO: coded_files(), CODE: CODE_FILES}
    for trusted in (False, True):
        settings = configured(trust_remote_code=trusted)
        snapshot, lock = ModelManager(settings).acquire(resolve_model(settings, HF_REPO))
        with lock:
            assert (snapshot.dependency(CODE) is not None) == trusted
    with pytest.raises(ModelInUseError), ModelManager(settings).acquire(resolve_model(settings, HF_REPO))[1]:
        ModelManager(settings).remove(CODE)


def test_base_model_from_modelscope_is_locked(
    configured: Callable[..., Settings], manager: ModelManager, modelscope: ModelScopeServer
) -> None:
    """A newer state of its branch does not replace files that are in use."""
    modelscope.repos["iic/lora"] = adapter_files(MS_REPO)
    _, lock = manager.acquire(resolve_model(configured(), "iic/lora"))
    modelscope.repos[MS_REPO] = {**modelscope_files(), "vocab.txt": b"[PAD]\n"}
    with lock, pytest.raises(ModelInUseError):
        manager.ensure(resolve_model(configured(), MS_REPO), force=True)
    manager.ensure(resolve_model(configured(), MS_REPO), force=True)
