"""Several processes on one cache, and processes that are killed."""

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
from tests.hubs.helpers import server_of
from tests.management.helpers import on_disk
from tests.service import wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.settings import Settings
    from tests.hubs.servers import HuggingFaceServer, ModelScopeServer

ROOT = Path(__file__).parents[2]

CHILD = """
import pathlib, sys, time
from emb_model_provider.model_resolver import resolve_model
from emb_model_provider.errors import ProviderError
from emb_model_provider.hubs.caches import SnapshotFiles
from emb_model_provider.management.manager import ModelManager
from emb_model_provider.settings.loading import load_settings

operation, name = sys.argv[1:]
settings = load_settings(pathlib.Path("no.env"))[0]
manager = ModelManager(settings)

def remove_one_file(files):
    (files.path / "config.json").unlink()
    print("half", flush=True)
    time.sleep(600)

try:
    if operation == "download":
        manager.ensure_model_cached(name)
    elif operation == "hold":
        snapshot, lock = manager.acquire(resolve_model(settings, name))
        print("held", flush=True)
        time.sleep(600)
    elif operation == "remove":
        print("ready", flush=True)
        sys.stdin.readline()
        manager.remove(name)
    else:
        SnapshotFiles.remove = remove_one_file
        manager.remove(name)
    print("DONE", flush=True)
except ProviderError as error:
    print("ERROR", type(error).__name__, flush=True)
"""


class Children:
    """Processes that run one operation of the manager, and end with the test."""

    def __init__(self, settings: Settings) -> None:
        hubs = settings.hubs
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("EMB_PROVIDER_")}
        self._environment = inherited | {
            "EMB_PROVIDER_CACHE_DIR": str(hubs.cache_dir),
            "EMB_PROVIDER_HF_CACHE_DIR": str(hubs.hf_cache_dir),
            "EMB_PROVIDER_HF_ENDPOINT": str(hubs.hf_endpoint),
            "EMB_PROVIDER_MODELSCOPE_CACHE_DIR": str(hubs.modelscope_cache_dir),
            "EMB_PROVIDER_MODELSCOPE_ENDPOINT": str(hubs.modelscope_endpoint),
        }
        self._all: list[subprocess.Popen[str]] = []

    def start(self, operation: str, name: str) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, operation, name],
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


def expect_line(child: subprocess.Popen[str], line: str) -> None:
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


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_killed_download_is_listed_resumed_and_removed(
    manager: ModelManager,
    children: Children,
    empty: dict[str, tuple[str, int]],
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
    tmp_path: Path,
    repo: str,
) -> None:
    """It is in use while it runs. Then it is incomplete: prune and rm remove all of it, pull completes it."""
    server, weights = server_of(repo, huggingface, modelscope)
    remove = manager.prune if repo == HF_REPO else lambda: manager.remove(repo)
    for operation in (remove, lambda: manager.ensure_model_cached(repo)):
        server.forget()
        server.faults.hold_after[weights] = 120_000
        child = children.start("download", repo)
        wait_until(lambda: server.bodies()[weights] == 1 and manager.list()[0].size > 0)
        assert manager.list()[0].in_use
        with pytest.raises(ModelInUseError):
            manager.remove(repo)
        kill(child)
        server.faults.hold_after.clear()
        (model,) = manager.list()
        assert (model.model_name, model.state, model.in_use) == (repo, "incomplete", False)
        before = on_disk(tmp_path)
        planned = manager.prune(dry_run=True)
        assert [each.model_name for each in planned.models] == [repo]
        assert on_disk(tmp_path) == before
        operation()
        if manager.list():
            assert manager.list()[0].state == "complete"
            assert not list(tmp_path.rglob("*.incomplete"))
        else:
            assert on_disk(tmp_path) == empty
    (model,) = manager.list()
    assert manager.verify(model).ok
    manager.remove(repo)
    assert on_disk(tmp_path) == empty


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_killed_removal_is_listed_and_completed(
    manager: ModelManager, children: Children, empty: dict[str, tuple[str, int]], tmp_path: Path, repo: str
) -> None:
    """Its model is incomplete: prune completes the removal, pull downloads the model again."""
    for operation in (lambda: manager.ensure_model_cached(repo), manager.prune):
        path = manager.ensure_model_cached(repo)
        child = children.start("remove half", repo)
        expect_line(child, "half")
        assert manager.list()[0].in_use
        kill(child)
        (model,) = manager.list()
        assert (model.state, model.path, model.in_use) == ("incomplete", str(path), False)
        operation()
        if manager.list():
            assert manager.verify(manager.list()[0]).ok
    assert on_disk(tmp_path) == empty


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_prune_keeps_what_another_program_has_completed(
    configured: Callable[..., Settings],
    manager: ModelManager,
    children: Children,
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
    repo: str,
) -> None:
    """A download was killed, and later the client itself completed it."""
    server, weights = server_of(repo, huggingface, modelscope)
    server.faults.hold_after[weights] = 120_000
    child = children.start("download", repo)
    wait_until(lambda: server.bodies()[weights] == 1)
    kill(child)
    server.faults.hold_after.clear()
    hubs = configured().hubs
    for journal in hubs.cache_dir.rglob("*.pending"):
        os.utime(journal, (1, 1))  # long ago
    if repo == HF_REPO:
        from huggingface_hub import snapshot_download

        completed = Path(snapshot_download(repo, cache_dir=hubs.hf_cache_dir, endpoint=huggingface.url))
    else:
        from modelscope_hub import HubApi, HubConfig

        api = HubApi(HubConfig(endpoint=modelscope.url, cache_dir=hubs.modelscope_cache_dir))
        completed = api.download_repo(repo, "model", cache_dir=hubs.modelscope_cache_dir)
    manager.prune()
    assert not manager.list()
    assert (completed / weights).read_bytes() == WEIGHTS
    server.forget()
    assert manager.ensure_model_cached(repo) == completed
    assert weights not in server.bodies()


def test_model_that_another_process_uses_is_not_removed(
    manager: ModelManager, children: Children, tmp_path: Path
) -> None:
    """It can be removed when that process was killed."""
    child = children.start("hold", MS_REPO)
    expect_line(child, "held")
    assert manager.list()[0].in_use
    before = on_disk(tmp_path)
    with pytest.raises(ModelInUseError):
        manager.remove(MS_REPO, wait_s=0.5)
    assert manager.remove_all().kept
    assert not manager.prune().models
    assert on_disk(tmp_path) == before
    kill(child)
    assert not manager.list()[0].in_use
    manager.remove(MS_REPO)
    assert not manager.list()


def test_one_of_two_processes_removes_a_model(
    configured: Callable[..., Settings],
    manager: ModelManager,
    children: Children,
    empty: dict[str, tuple[str, int]],
    tmp_path: Path,
) -> None:
    """The other one fails with a clear error."""
    manager.ensure_model_cached(resolve_model(configured(), HF_REPO).name)
    processes = [children.start("remove", HF_REPO) for _ in range(2)]
    for child in processes:
        expect_line(child, "ready")
    outputs = [child.communicate("go\n")[0].strip() for child in processes]
    assert "DONE" in outputs
    assert set(outputs) <= {"DONE", "ERROR NotCachedError", "ERROR ModelInUseError"}
    assert on_disk(tmp_path) == empty


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_removal_waits_for_a_download(
    manager: ModelManager, children: Children, huggingface: HuggingFaceServer, modelscope: ModelScopeServer, repo: str
) -> None:
    """A model that another process downloads is removed when the download is complete."""
    server, weights = server_of(repo, huggingface, modelscope)
    server.faults.hold_after[weights] = 1_000
    child = children.start("download", repo)
    wait_until(lambda: server.bodies()[weights] == 1)
    with pytest.raises(ModelInUseError):
        manager.remove(repo)
    threading.Timer(0.5, server.faults.release.set).start()
    manager.remove(repo, wait_s=120.0)
    assert child.communicate()[0].strip() == "DONE"
    assert not manager.list()
