"""Updates of a branch on ModelScope, which has one directory for it: the older state is kept, or replaced as a whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.errors import CorruptSnapshotError, ModelInUseError
from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.management.manager import ModelManager
from emb_model_provider.model_resolver import resolve_model
from emb_model_provider.snapshots.locks import FileLock, SnapshotLocks
from tests.hubs.conftest import MS_REPO, WEIGHTS
from tests.hubs.helpers import write_files
from tests.management.helpers import on_disk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.progress import Progress
    from emb_model_provider.settings import Settings
    from emb_model_provider.snapshots.snapshot import Snapshot
    from tests.hubs.servers import ModelScopeServer

NEWER = {
    "config.json": b'{"model_type": "bert", "hidden_size": 9}',
    "pytorch_model.bin": WEIGHTS[::-1],
    "added.json": b"{}",
}


@pytest.fixture
def older(manager: ModelManager, modelscope: ModelScopeServer) -> Path:
    """Return the directory of a model of whose branch the hub has a newer state; sizes are unchanged."""
    path = manager.ensure_model_cached(MS_REPO)
    modelscope.repos[MS_REPO] |= NEWER
    modelscope.forget()
    return path


def test_update_replaces_changed_files(
    manager: ModelManager, modelscope: ModelScopeServer, older: Path, tmp_path: Path
) -> None:
    """Only these are downloaded, and nothing else is left."""
    before = set(on_disk(tmp_path / "ms"))
    assert manager.ensure_model_cached(MS_REPO, force=True) == older
    assert set(modelscope.bodies()) == set(NEWER)
    assert {name: (older / name).read_bytes() for name in NEWER} == NEWER
    assert set(on_disk(tmp_path / "ms")) - before == {str(older / "added.json")}
    assert manager.verify(manager.list()[0]).ok


def test_model_in_use_is_not_updated(
    configured: Callable[..., Settings], manager: ModelManager, older: Path, tmp_path: Path
) -> None:
    _, lock = manager.acquire(resolve_model(configured(), MS_REPO))
    before = on_disk(tmp_path)
    with pytest.raises(ModelInUseError, match=r"nothing was replaced.*emb-provider unload iic/tiny"):
        manager.ensure_model_cached(MS_REPO, force=True)
    assert on_disk(tmp_path) == before
    assert (older / "pytorch_model.bin").read_bytes() == WEIGHTS
    assert manager.verify(manager.list()[0]).ok
    lock.release()
    manager.ensure_model_cached(MS_REPO, force=True)
    assert (older / "pytorch_model.bin").read_bytes() == NEWER["pytorch_model.bin"]


def test_model_that_is_used_during_the_download_is_not_updated(
    configured: Callable[..., Settings], manager: ModelManager, older: Path
) -> None:
    """The older state is kept as a whole, and the next attempt succeeds."""
    settings = configured()
    locks: list[FileLock] = []

    def on_progress(progress: Progress) -> None:
        if progress.phase == "download" and not locks:
            locks.append(SnapshotLocks(settings.hubs.cache_dir).hold(older))

    with pytest.raises(ModelInUseError):
        fetch_snapshot(resolve_model(settings, MS_REPO), settings.hubs, on_progress, force=True)
    locks.pop().release()
    assert manager.verify(manager.list()[0]).ok
    assert (older / "pytorch_model.bin").read_bytes() == WEIGHTS
    manager.ensure_model_cached(MS_REPO, force=True)
    assert (older / "pytorch_model.bin").read_bytes() == NEWER["pytorch_model.bin"]


def test_failed_update_keeps_the_older_state(
    configured: Callable[..., Settings], manager: ModelManager, modelscope: ModelScopeServer, older: Path
) -> None:
    """It is served, offline too. What was downloaded is removed by `prune`."""
    modelscope.faults.wrong_bytes["pytorch_model.bin"] = 99
    with pytest.raises(CorruptSnapshotError):
        manager.ensure_model_cached(MS_REPO, force=True)
    assert manager.verify(manager.list()[0]).ok
    assert ModelManager(configured(offline=True)).ensure_model_cached(MS_REPO) == older
    planned = manager.prune(dry_run=True)
    assert manager.prune().freed == planned.freed > 0
    assert {path.name for path in older.parents[1].iterdir()} == {"snapshots"}
    assert manager.verify(manager.list()[0]).ok


def test_update_that_was_killed_while_it_replaced_files(
    configured: Callable[..., Settings], manager: ModelManager, older: Path
) -> None:
    """The manifest is missing, and staged files are left, which the next download removes."""
    staging = older.parents[1] / ".newer"
    write_files(staging, NEWER)
    for path in configured().hubs.cache_dir.rglob("*.json"):
        path.unlink()
    manager.ensure_model_cached(MS_REPO)
    assert (older / "pytorch_model.bin").read_bytes() == NEWER["pytorch_model.bin"]
    assert not staging.exists()


def test_model_that_is_updated_before_it_is_locked(
    configured: Callable[..., Settings], manager: ModelManager, older: Path
) -> None:
    """The snapshot that is returned describes the newer files."""

    class Unlucky(ModelManager):
        def ensure(self, spec: ModelSpec, **options: Any) -> Snapshot:
            snapshot = super().ensure(spec, **options)
            if (older / "pytorch_model.bin").read_bytes() == WEIGHTS:
                manager.ensure_model_cached(MS_REPO, force=True)
            return snapshot

    snapshot, lock = Unlucky(configured()).acquire(resolve_model(configured(), MS_REPO))
    with lock:
        assert {file.path: file.size for file in snapshot.files}["added.json"] == len(NEWER["added.json"])
        assert manager.verify(manager.list()[0]).ok
