"""Removal of models from disk."""

from __future__ import annotations

import shutil
import threading
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import ManagementError, ModelInUseError
from emb_model_provider.management.manager import ModelManager
from emb_model_provider.model_resolver import resolve_model
from emb_model_provider.model_spec import BUNDLED_MODEL
from tests.hubs.conftest import HF_REPO, MS_REPO, WEIGHTS, model_files, modelscope_files
from tests.hubs.helpers import write_files
from tests.management.helpers import on_disk
from tests.service import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.settings import Settings
    from tests.hubs.servers import HuggingFaceServer, ModelScopeServer


def test_removal_leaves_only_locks(
    configured: Callable[..., Settings], manager: ModelManager, empty: dict[str, tuple[str, int]], tmp_path: Path
) -> None:
    """A model from each hub is downloaded, used and removed with its manifest and directories."""
    for name in (HF_REPO, MS_REPO):
        _, lock = manager.acquire(resolve_model(configured(), name))
        lock.release()
    assert [model.model_name for model in manager.list()] == [HF_REPO, MS_REPO]
    freed = sum(manager.evict_model(name).freed for name in (HF_REPO, MS_REPO))
    assert freed >= 2 * len(WEIGHTS)
    assert not manager.list()
    assert on_disk(tmp_path) == empty


def test_removal_keeps_files_that_other_revisions_share(manager: ModelManager, huggingface: HuggingFaceServer) -> None:
    huggingface.revisions = ("main", "v1")
    old = manager.ensure_model_cached(HF_REPO, revision="v1")
    huggingface.repos[HF_REPO]["config.json"] = b'{"model_type": "bert", "hidden_size": 16}'
    new = manager.ensure_model_cached(HF_REPO)
    assert old != new
    removal = manager.remove(HF_REPO, revision="v1")
    assert removal.freed < len(WEIGHTS)
    assert not old.exists()
    (model,) = manager.list()
    assert model.path == str(new)
    assert manager.verify(model).ok
    assert manager.remove(HF_REPO).freed > len(WEIGHTS)


@pytest.mark.parametrize("remove_all", [False, True], ids=["remove", "remove_all"])
def test_shared_files_of_removed_revisions_are_counted_once(
    manager: ModelManager, huggingface: HuggingFaceServer, tmp_path: Path, remove_all: bool
) -> None:
    """A dry run reports the same size as the removal."""
    huggingface.revisions = ("main", "v1")
    manager.ensure_model_cached(HF_REPO, revision="v1")
    huggingface.repos[HF_REPO]["config.json"] = b'{"model_type": "bert", "hidden_size": 16}'
    manager.ensure_model_cached(HF_REPO)
    blobs = (tmp_path / "hf" / "models--acme--tiny" / "blobs").iterdir()
    size = sum(blob.stat().st_size for blob in blobs)
    assert len(WEIGHTS) < size < 2 * len(WEIGHTS)
    for dry_run in (True, False):
        removal = manager.remove_all(dry_run=dry_run) if remove_all else manager.remove(HF_REPO, dry_run=dry_run)
        assert removal.freed == size
    assert not manager.list()


def test_shared_files_count_once_in_the_total(
    manager: ModelManager, huggingface: HuggingFaceServer, tmp_path: Path
) -> None:
    """Two revisions are links to the same files."""
    huggingface.revisions = ("main", "v1")
    manager.ensure_model_cached(HF_REPO, revision="v1")
    huggingface.repos[HF_REPO]["config.json"] = b'{"model_type": "bert", "hidden_size": 16}'
    manager.ensure_model_cached(HF_REPO)
    manager.ensure_model_cached(BUNDLED_MODEL)
    models = manager.list()
    blobs = sum(blob.stat().st_size for blob in (tmp_path / "hf" / "models--acme--tiny" / "blobs").iterdir())
    bundled = next(model.files_size for model in models if model.source == "bundled")
    assert manager.total_size(models) == blobs + bundled
    assert sum(model.files_size for model in models) > blobs + bundled + len(WEIGHTS) / 2


def test_models_that_are_removed_together_are_counted_together(
    configured: Callable[..., Settings], manager: ModelManager, huggingface: HuggingFaceServer, tmp_path: Path
) -> None:
    """The dry run of several names reports what their removal frees."""
    huggingface.repos["acme/other"] = model_files()
    huggingface.revisions = ("main", "v1")
    names: list[tuple[str, str | None]] = [(HF_REPO, None), (HF_REPO, "v1"), ("acme/other", None)]
    for name, revision in names:
        manager.ensure_model_cached(name, revision=revision)
    planned = manager.remove_together(names, dry_run=True)
    blobs = [path for path in (tmp_path / "hf").rglob("blobs/*") if path.is_file()]
    assert planned.freed == sum(path.stat().st_size for path in blobs)
    assert manager.remove_together(names).freed == planned.freed
    assert not manager.list()


def test_removal_of_all_is_limited_to_the_configured_directories(
    configured: Callable[..., Settings], manager: ModelManager, tmp_path: Path
) -> None:
    """A model in a directory of earlier settings is kept, unless it is named."""
    elsewhere = ModelManager(configured(modelscope_cache_dir=tmp_path / "elsewhere"))
    path = elsewhere.ensure_model_cached(MS_REPO)
    assert path.is_relative_to(tmp_path / "elsewhere")
    manager.ensure_model_cached(HF_REPO)
    for dry_run in (True, False):
        removal = manager.remove_all(dry_run=dry_run)
        assert [model.model_name for model in removal.models] == [HF_REPO]
        (kept,) = removal.kept
        assert kept.path == str(path)
        assert f"`emb-provider rm {MS_REPO}`" in kept.reason
    assert (path / "config.json").is_file()
    assert [model.model_name for model in manager.list()] == [MS_REPO]
    manager.remove(MS_REPO)
    assert not path.exists()


def test_error_says_how_the_model_is_used(
    configured: Callable[..., Settings], manager: ModelManager, modelscope: ModelScopeServer
) -> None:
    """A download cannot be unloaded."""
    snapshot, lock = manager.acquire(resolve_model(configured(), MS_REPO))
    with lock:
        for dry_run in (True, False):
            with pytest.raises(ModelInUseError, match=f"has loaded it.*`emb-provider rm --unload {MS_REPO}`"):
                manager.remove(MS_REPO, dry_run=dry_run)
    modelscope.faults.hold_after["pytorch_model.bin"] = 100
    shutil.rmtree(snapshot.path)
    download = threading.Thread(target=manager.ensure_model_cached, args=(MS_REPO,))
    download.start()
    try:
        wait_until(lambda: any(model.in_use for model in manager.list()))
        for dry_run in (True, False):
            with pytest.raises(ModelInUseError, match="being downloaded or removed") as raised:
                manager.remove(MS_REPO, dry_run=dry_run)
            assert "unload" not in str(raised.value)
    finally:
        modelscope.faults.release.set()
        download.join()


def test_model_in_use_is_not_removed(
    configured: Callable[..., Settings], manager: ModelManager, tmp_path: Path
) -> None:
    """It is an error, and nothing changes; a removal that waits goes on when the model is released."""
    _, lock = manager.acquire(resolve_model(configured(), MS_REPO))
    before = on_disk(tmp_path)
    assert manager.list()[0].in_use
    for dry_run in (False, True):
        with pytest.raises(ModelInUseError, match="Nothing was removed"):
            manager.remove(MS_REPO, dry_run=dry_run)
    assert [model.model_name for model in manager.remove_all().kept] == [MS_REPO]
    assert on_disk(tmp_path) == before
    threading.Timer(0.3, lock.release).start()
    removal = manager.remove(MS_REPO, wait_s=60.0)
    assert [(model.model_name, model.in_use) for model in removal.models] == [(MS_REPO, False)]
    assert not manager.list()


def test_dry_run_can_assume_that_a_model_is_released(
    configured: Callable[..., Settings], manager: ModelManager
) -> None:
    snapshot, lock = manager.acquire(resolve_model(configured(), MS_REPO))
    with lock:
        for removal in (
            manager.remove(MS_REPO, dry_run=True, released=[snapshot.path]),
            manager.remove_all(dry_run=True, released=[snapshot.path]),
        ):
            assert ([model.model_name for model in removal.models], removal.kept) == ([MS_REPO], [])


def test_models_of_one_name_are_removed_together_or_not_at_all(
    configured: Callable[..., Settings], huggingface: HuggingFaceServer
) -> None:
    """One name is on both hubs, and one of the models is in use. A source limits the removal to one hub."""
    huggingface.repos[MS_REPO] = model_files()
    manager = ModelManager(configured())
    for source in ("huggingface", "modelscope"):
        manager.ensure_model_cached(MS_REPO, source=source)
    _, lock = manager.acquire(resolve_model(configured(), MS_REPO, source="modelscope"))
    with lock:
        with pytest.raises(ModelInUseError):
            manager.remove(MS_REPO)
        assert len(manager.list()) == 2
        manager.remove(MS_REPO, source="huggingface")
        assert [model.source for model in manager.list()] == ["modelscope"]


def test_dry_run_reports_what_the_removal_frees(manager: ModelManager, tmp_path: Path) -> None:
    manager.ensure_model_cached(HF_REPO)
    before = on_disk(tmp_path)
    planned = manager.remove(HF_REPO, dry_run=True)
    assert manager.remove_all(dry_run=True).freed == planned.freed
    assert on_disk(tmp_path) == before
    assert manager.remove(HF_REPO).freed == planned.freed


def test_files_of_directories_and_of_the_bundled_model_are_kept(
    manager: ModelManager, empty: dict[str, tuple[str, int]], tmp_path: Path
) -> None:
    """Only their manifests are removed. A directory is found by its path."""
    write_files(tmp_path / "mine", model_files())
    before = on_disk(tmp_path)
    manager.ensure_model_cached(str(tmp_path / "mine"))
    bundled = manager.ensure_model_cached(BUNDLED_MODEL)
    assert {model.source for model in manager.list()} == {"local", "bundled"}
    assert manager.inspect(manager.find(str(tmp_path / "mine"))[0]).dimensions == 8
    assert manager.remove(str(tmp_path / "mine")).freed == 0
    manager.remove(BUNDLED_MODEL)
    assert on_disk(tmp_path) == before
    assert before.keys() > empty.keys()
    assert (bundled / "model.safetensors").is_file()


def test_removal_does_not_follow_links(manager: ModelManager, tmp_path: Path) -> None:
    """A link in a snapshot is removed, and its target is kept; a snapshot behind a link is not removed."""
    write_files(tmp_path / "precious", {"a.txt": b"a", "config.json": b"{}"})
    path = manager.ensure_model_cached(HF_REPO)
    (path / "link").symlink_to(tmp_path / "precious")
    (path / "file").symlink_to(tmp_path / "precious" / "a.txt")
    manager.remove(HF_REPO)
    assert not path.exists()
    assert (tmp_path / "precious" / "a.txt").read_bytes() == b"a"

    path = manager.ensure_model_cached(MS_REPO)
    shutil.move(path.parent, tmp_path / "elsewhere")
    path.parent.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ManagementError, match="symbolic link"):
        manager.remove(MS_REPO)
    assert (tmp_path / "elsewhere" / "master" / "pytorch_model.bin").read_bytes() == WEIGHTS


def test_manifest_of_another_directory_removes_nothing(
    configured: Callable[..., Settings], manager: ModelManager, tmp_path: Path
) -> None:
    """The client would not have created the directory that the manifest names."""
    path = manager.ensure_model_cached(MS_REPO)
    shutil.copytree(path, tmp_path / "precious")
    for manifest in configured().hubs.cache_dir.rglob("*.json"):
        manifest.write_text(manifest.read_text().replace(str(path), str(tmp_path / "precious")))
    with pytest.raises(ManagementError, match="left alone"):
        manager.remove(MS_REPO)
    assert (tmp_path / "precious" / "pytorch_model.bin").read_bytes() == WEIGHTS


def test_removal_from_an_older_cache_keeps_other_models(
    manager: ModelManager, modelscope: ModelScopeServer, tmp_path: Path
) -> None:
    """The link that an older client left next to the directory is removed, too."""
    root = tmp_path / "ms" / "hub" / "models" / "iic"
    modelscope.repos["iic/tiny-v1.5"] = modelscope_files()
    write_files(root / "tiny-v1___5", modelscope_files())
    (root / "tiny-v1.5").symlink_to("tiny-v1___5")
    write_files(root / "other", modelscope_files())
    manager.ensure_model_cached("iic/tiny-v1.5")
    manager.evict_model("iic/tiny-v1.5")
    assert [path.name for path in root.iterdir()] == ["other"]
    assert (root / "other" / "pytorch_model.bin").read_bytes() == WEIGHTS
