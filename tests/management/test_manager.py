"""Downloading, holding and copying models with the manager, and the real clients and local servers of two hubs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.errors import ModelInUseError, NotCachedError, RepositoryNotFoundError
from emb_model_provider.management.manager import ModelManager, get_model_manager
from emb_model_provider.model_resolver import resolve_model
from tests.hubs.conftest import HF_REPO, MS_REPO, WEIGHTS, model_files
from tests.service import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.progress import WorkRecord
    from emb_model_provider.settings import Settings
    from emb_model_provider.snapshots.snapshot import Snapshot
    from tests.hubs.servers import HuggingFaceServer, ModelScopeServer


def test_copy_is_complete_and_checked(manager: ModelManager, tmp_path: Path) -> None:
    """`local_dir` gets files instead of links; a file that was changed there is replaced."""
    copy = manager.ensure_model_cached(HF_REPO, local_dir=tmp_path / "copy")
    assert copy == tmp_path / "copy"
    assert (copy / "model.safetensors").read_bytes() == WEIGHTS
    assert not any(path.is_symlink() for path in copy.rglob("*"))
    (copy / "config.json").write_text("{}")
    manager.ensure_model_cached(HF_REPO, local_dir=str(copy))
    assert (copy / "config.json").read_bytes() == model_files()["config.json"]


def test_downloads_are_recorded(configured: Callable[..., Settings], huggingface: HuggingFaceServer) -> None:
    """Once for each download, with its bytes. Files that are on disk, or that the hub does not have, are no download."""
    records: list[WorkRecord] = []
    manager = ModelManager(configured(), on_work=records.append)
    for _ in range(2):
        manager.ensure(resolve_model(configured(), HF_REPO))
    with pytest.raises(RepositoryNotFoundError):
        manager.ensure(resolve_model(configured(), "no/such"))
    (record,) = records
    assert (record.kind, record.model, record.outcome) == ("download", HF_REPO, "ok")
    assert record.transferred_bytes >= len(WEIGHTS)
    assert record.duration_s > 0


def test_hub_of_a_manager(configured: Callable[..., Settings], huggingface: HuggingFaceServer) -> None:
    """`use_modelscope` selects the hub of models for which nothing else names one; without it the settings do."""
    huggingface.repos[MS_REPO] = model_files()
    settings = configured()
    modelscope = get_model_manager(use_modelscope=True, settings=settings)
    assert "ms" in modelscope.ensure_model_cached(MS_REPO).parts
    other = get_model_manager(use_modelscope=False, settings=settings)
    assert "hf" in other.ensure_model_cached(MS_REPO).parts
    other.evict_model(MS_REPO)
    assert [model.source for model in other.list()] == ["modelscope"]
    assert "ms" in get_model_manager(settings=settings).ensure_model_cached(MS_REPO).parts


def test_model_that_is_removed_before_it_is_locked_is_downloaded_again(
    configured: Callable[..., Settings], manager: ModelManager, modelscope: ModelScopeServer
) -> None:
    class Unlucky(ModelManager):
        def ensure(self, spec: ModelSpec, **options: Any) -> Snapshot:
            snapshot = super().ensure(spec, **options)
            if modelscope.bodies()["pytorch_model.bin"] == 1:
                manager.remove(MS_REPO)
            return snapshot

    snapshot, lock = Unlucky(configured()).acquire(resolve_model(configured(), MS_REPO))
    with lock:
        assert (snapshot.path / "pytorch_model.bin").read_bytes() == WEIGHTS
        with pytest.raises(ModelInUseError):
            manager.remove(MS_REPO)
    assert modelscope.bodies()["pytorch_model.bin"] == 2


def test_acquired_model_is_complete_while_others_remove_it(
    configured: Callable[..., Settings], manager: ModelManager, modelscope: ModelScopeServer
) -> None:
    """Two threads acquire and release a model, one removes it, one verifies it."""
    spec = resolve_model(configured(), MS_REPO)
    stop = threading.Event()
    failures: list[BaseException] = []

    def repeat(operation: Callable[[], object]) -> None:
        while not stop.is_set():
            try:
                operation()
            except (NotCachedError, ModelInUseError):
                pass
            except BaseException as error:  # noqa: BLE001 - reported by the test
                failures.append(error)
                return

    def verify() -> None:
        for model in manager.list():
            assert not manager.verify(model).findings

    def use() -> None:
        try:
            for _ in range(6):
                snapshot, lock = manager.acquire(spec)
                with lock:
                    names = {file.path for file in snapshot.files}
                    assert {name for name in names if (snapshot.path / name).is_file()} == names
        except BaseException as error:  # noqa: BLE001 - reported by the test
            failures.append(error)

    others = [
        threading.Thread(target=repeat, args=(operation,)) for operation in (lambda: manager.remove(MS_REPO), verify)
    ]
    users = [threading.Thread(target=use) for _ in range(2)]
    for thread in (*others, *users):
        thread.start()
    for thread in users:
        thread.join()
    stop.set()
    for thread in others:
        thread.join()
    assert not failures
    wait_until(lambda: not any(model.in_use for model in manager.list()))
    assert modelscope.bodies()["pytorch_model.bin"] >= 1
