"""A branch that moves on at ModelScope, which has one directory for it: all of the older state, or all of the newer one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from emb_model_provider.errors import CorruptSnapshotError, ModelInUseError
from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.management.manager import ModelManager
from emb_model_provider.model_resolver import resolve_model
from tests.hubs.conftest import MS_REPO, WEIGHTS
from tests.management.conftest import on_disk

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.model_spec import ModelSpec
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
    """A model's directory, of whose branch the hub has a newer state of the same sizes by now."""
    path = manager.ensure_model_cached(MS_REPO)
    modelscope.repos[MS_REPO] |= NEWER
    modelscope.forget()
    return path


def test_a_newer_state_takes_the_place_of_the_older_one(
    manager: ModelManager, modelscope: ModelScopeServer, older: Path, tmp_path: Path
) -> None:
    """What changed is fetched, only that, into the same directory, and nothing else is left."""
    before = set(on_disk(tmp_path / "ms"))
    assert manager.ensure_model_cached(MS_REPO, force=True) == older
    assert set(modelscope.bodies()) == set(NEWER)
    assert {name: (older / name).read_bytes() for name in NEWER} == NEWER
    assert set(on_disk(tmp_path / "ms")) - before == {str(older / "added.json")}
    assert manager.verify(manager.list()[0]).ok


def test_a_model_in_use_is_not_replaced(
    configured: Callable[..., Settings], manager: ModelManager, older: Path, tmp_path: Path
) -> None:
    """While a process has loaded the older state, fetching the newer one is refused, and changes nothing."""
    _, hold = manager.acquire(resolve_model(configured(), MS_REPO))
    before = on_disk(tmp_path)
    with pytest.raises(ModelInUseError, match=r"nothing was replaced.*emb-provider unload iic/tiny"):
        manager.ensure_model_cached(MS_REPO, force=True)
    assert {path for path in set(on_disk(tmp_path)) ^ set(before) if "holds" not in path} == set()
    assert (older / "pytorch_model.bin").read_bytes() == WEIGHTS
    assert manager.verify(manager.list()[0]).ok
    hold.release()
    manager.ensure_model_cached(MS_REPO, force=True)
    assert (older / "pytorch_model.bin").read_bytes() == NEWER["pytorch_model.bin"]


def test_a_model_that_comes_into_use_meanwhile_is_not_replaced(
    configured: Callable[..., Settings], manager: ModelManager, older: Path
) -> None:
    """Somebody loads it while the newer state is fetched: the older one stays, whole; trying again goes on."""
    answers = [False, True]
    settings = configured()
    with pytest.raises(ModelInUseError):
        fetch_snapshot(
            resolve_model(settings, MS_REPO), settings.hubs, force=True, is_held=lambda _: answers.pop(0)
        )
    assert not answers
    assert manager.verify(manager.list()[0]).ok
    assert (older / "pytorch_model.bin").read_bytes() == WEIGHTS
    manager.ensure_model_cached(MS_REPO, force=True)
    assert (older / "pytorch_model.bin").read_bytes() == NEWER["pytorch_model.bin"]


def test_a_failed_fetch_of_a_newer_state_leaves_the_older_one_whole(
    configured: Callable[..., Settings],
    manager: ModelManager,
    modelscope: ModelScopeServer,
    older: Path,
) -> None:
    """Of the newer state one file does not arrive: the older one is served, offline too; what was begun can be removed."""
    modelscope.faults.wrong_bytes["pytorch_model.bin"] = 99
    with pytest.raises(CorruptSnapshotError):
        manager.ensure_model_cached(MS_REPO, force=True)
    assert manager.verify(manager.list()[0]).ok
    assert ModelManager(configured(offline=True)).ensure_model_cached(MS_REPO) == older
    manager.prune()
    assert {path.name for path in older.parents[1].iterdir()} == {"snapshots"}
    assert manager.verify(manager.list()[0]).ok


def test_a_model_replaced_before_it_is_held_is_the_newer_one(
    configured: Callable[..., Settings], manager: ModelManager, older: Path
) -> None:
    """Between its look-up and the hold the newer state comes: what is returned names the bytes that are there."""

    class Unlucky(ModelManager):
        def ensure(self, spec: ModelSpec, **options: Any) -> Snapshot:
            snapshot = super().ensure(spec, **options)
            if (older / "pytorch_model.bin").read_bytes() == WEIGHTS:
                manager.ensure_model_cached(MS_REPO, force=True)
            return snapshot

    snapshot, hold = Unlucky(configured()).acquire(resolve_model(configured(), MS_REPO))
    with hold:
        assert snapshot.digest == manager.list()[0].digest
        assert "added.json" in {file.path for file in snapshot.files}
