"""Several processes, and processes that are killed: at every moment the disk is in order, or can be put in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import ModelInUseError
from emb_model_provider.model_resolver import resolve_model
from tests.hubs.conftest import HF_REPO, MS_REPO, WEIGHTS
from tests.hubs.test_processes import both
from tests.management.conftest import on_disk
from tests.service import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.settings import Settings
    from tests.hubs.servers import HuggingFaceServer, ModelScopeServer

ROOT = Path(__file__).parents[2]

CHILD = """
import pathlib, sys, time
from emb_model_provider.model_resolver import choose
from emb_model_provider.errors import ProviderError
from emb_model_provider.management.removal import SnapshotFiles
from emb_model_provider.management.manager import ModelManager
from emb_model_provider.settings.loading import load_settings

what, name = sys.argv[1:]
settings = load_settings(pathlib.Path("no.env"))[0]
manager = ModelManager(settings)

def half(files):
    (files.path / "config.json").unlink()
    print("half", flush=True)
    time.sleep(600)

try:
    if what == "fetch":
        manager.ensure_model_cached(name)
    elif what == "hold":
        snapshot, hold = manager.acquire(choose(settings, name))
        print("held", flush=True)
        time.sleep(600)
    elif what == "remove":
        print("ready", flush=True)
        sys.stdin.readline()
        manager.remove(name)
    else:
        SnapshotFiles.remove = half
        manager.remove(name)
    print("DONE", flush=True)
except ProviderError as error:
    print("ERROR", type(error).__name__, flush=True)
"""


class Children:
    """Processes that do one thing with the manager, and end with the test."""

    def __init__(self, settings: Settings) -> None:
        hubs = settings.hubs
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith("EMB_PROVIDER_")
        }
        self._environment = inherited | {
            "EMB_PROVIDER_CACHE_DIR": str(hubs.cache_dir),
            "EMB_PROVIDER_HF_CACHE_DIR": str(hubs.hf_cache_dir),
            "EMB_PROVIDER_HF_ENDPOINT": str(hubs.hf_endpoint),
            "EMB_PROVIDER_MODELSCOPE_CACHE_DIR": str(hubs.modelscope_cache_dir),
            "EMB_PROVIDER_MODELSCOPE_ENDPOINT": str(hubs.modelscope_endpoint),
        }
        self._all: list[subprocess.Popen[str]] = []

    def start(self, what: str, name: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, what, name],
            cwd=ROOT,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._all.append(child)
        return child

    def end(self) -> None:
        for child in self._all:
            if child.poll() is None:
                child.kill()
            child.communicate()


def says(child: subprocess.Popen[str], line: str) -> None:
    assert child.stdout is not None
    assert child.stdout.readline() == f"{line}\n"


def kill(child: subprocess.Popen[str]) -> None:
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL


@pytest.fixture
def children(configured: Callable[..., Settings]) -> Iterator[Children]:
    children = Children(configured())
    yield children
    children.end()


@pytest.fixture
def empty(configured: Callable[..., Settings], tmp_path: Path) -> dict[str, tuple[str, int]]:
    """The disk with empty caches."""
    hubs = configured().hubs()
    for directory in (hubs.cache_dir, hubs.hf_cache_dir, hubs.modelscope_cache_dir):
        assert directory is not None
        directory.mkdir()
    return on_disk(tmp_path)


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_what_a_killed_fetch_left_is_seen_resumed_and_removed(
    manager: ModelManager,
    children: Children,
    empty: dict[str, tuple[str, int]],
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
    tmp_path: Path,
    repo: str,
) -> None:
    """It is in use while it runs; killed, it is incomplete: prune and rm leave the disk as it was; pull mends it."""
    server, weights = both(repo, huggingface, modelscope)
    remove = manager.prune if repo == HF_REPO else lambda: manager.remove(repo)
    for mend in (remove, lambda: manager.ensure_model_cached(repo)):
        server.forget()
        server.faults.hold_after[weights] = 120_000
        child = children.start("fetch", repo)
        wait_until(lambda: server.bodies()[weights] == 1 and manager.list()[0].size > 0)
        assert manager.list()[0].in_use
        with pytest.raises(ModelInUseError):
            manager.remove(repo)
        kill(child)
        server.faults.hold_after.clear()
        (entry,) = manager.list()
        assert (entry.name, entry.state, entry.in_use) == (repo, "incomplete", False)
        before = on_disk(tmp_path)
        would = manager.prune(dry_run=True)
        assert [each.name for each in would.snapshots] == [repo]
        assert on_disk(tmp_path) == before
        mend()
        if manager.list():
            assert manager.list()[0].state == "complete"
        else:
            assert on_disk(tmp_path) == empty
    (entry,) = manager.list()
    assert manager.verify(entry).ok
    manager.remove(repo)
    assert on_disk(tmp_path) == empty


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_what_a_killed_removal_left_is_seen_and_goes(
    manager: ModelManager,
    children: Children,
    empty: dict[str, tuple[str, int]],
    tmp_path: Path,
    repo: str,
) -> None:
    """A removal that was killed half-way is incomplete; prune ends it, and pull makes the model whole again."""
    for mend in (lambda: manager.ensure_model_cached(repo), manager.prune):
        path = manager.ensure_model_cached(repo)
        child = children.start("remove by half", repo)
        says(child, "half")
        assert manager.list()[0].in_use
        kill(child)
        (entry,) = manager.list()
        assert (entry.state, entry.path, entry.in_use) == ("incomplete", path, False)
        mend()
        if manager.list():
            assert manager.verify(manager.list()[0]).ok
    assert on_disk(tmp_path) == empty


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_what_another_program_finished_is_not_removed(
    configured: Callable[..., Settings],
    manager: ModelManager,
    children: Children,
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
    repo: str,
) -> None:
    """A fetch of ours was killed, and later the client was used by hand: prune leaves what it completed alone."""
    server, weights = both(repo, huggingface, modelscope)
    server.faults.hold_after[weights] = 120_000
    child = children.start("fetch", repo)
    wait_until(lambda: server.bodies()[weights] == 1)
    kill(child)
    server.faults.hold_after.clear()
    hubs = configured().hubs()
    for marker in hubs.cache_dir.rglob("*.pending"):
        os.utime(marker, (1, 1))  # long ago
    if repo == HF_REPO:
        from huggingface_hub import snapshot_download

        theirs = Path(snapshot_download(repo, cache_dir=hubs.hf_cache_dir, endpoint=huggingface.url))
    else:
        from modelscope_hub import HubApi, HubConfig

        api = HubApi(HubConfig(endpoint=modelscope.url, cache_dir=hubs.modelscope_cache_dir))
        theirs = api.download_repo(repo, "model", cache_dir=hubs.modelscope_cache_dir)
    manager.prune()
    assert not manager.list()
    assert (theirs / weights).read_bytes() == WEIGHTS
    server.forget()
    assert manager.ensure_model_cached(repo) == theirs
    assert weights not in server.bodies()


def test_a_model_that_another_process_holds_is_not_removed(
    manager: ModelManager, children: Children, tmp_path: Path
) -> None:
    """It is shown to be in use, and kept by every way of removing; once that process is killed it can be removed."""
    child = children.start("hold", MS_REPO)
    says(child, "held")
    assert manager.list()[0].in_use
    before = on_disk(tmp_path)
    with pytest.raises(ModelInUseError):
        manager.remove(MS_REPO, wait_s=0.5)
    assert manager.remove_all().kept
    assert not manager.prune().snapshots
    assert on_disk(tmp_path) == before
    kill(child)
    assert not manager.list()[0].in_use
    manager.remove(MS_REPO)
    assert not manager.list()


def test_of_two_processes_that_remove_one_does(
    configured: Callable[..., Settings],
    manager: ModelManager,
    children: Children,
    empty: dict[str, tuple[str, int]],
    tmp_path: Path,
) -> None:
    """Both end well or with a plain word, and the disk is as it was."""
    manager.ensure_model_cached(resolve_model(configured(), HF_REPO).name)
    both_of_them = [children.start("remove", HF_REPO) for _ in range(2)]
    for child in both_of_them:
        says(child, "ready")
    outputs = [child.communicate("go\n")[0].strip() for child in both_of_them]
    assert "DONE" in outputs
    assert set(outputs) <= {"DONE", "ERROR NotCachedError", "ERROR ModelInUseError"}
    assert on_disk(tmp_path) == empty


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_a_removal_waits_for_a_fetch_to_end(
    manager: ModelManager,
    children: Children,
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
    repo: str,
) -> None:
    """With time to wait, a model that another process is fetching is removed once it is there."""
    server, weights = both(repo, huggingface, modelscope)
    server.faults.hold_after[weights] = 1_000
    child = children.start("fetch", repo)
    wait_until(lambda: server.bodies()[weights] == 1)
    with pytest.raises(ModelInUseError):
        manager.remove(repo)
    threading.Timer(0.5, server.faults.release.set).start()
    manager.remove(repo, wait_s=120.0)
    assert child.communicate()[0].strip() == "DONE"
    assert not manager.list()
