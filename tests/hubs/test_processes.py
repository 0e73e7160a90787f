"""Downloads in processes that are killed, run in parallel, or cannot write."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.hubs.fetch import fetch_snapshot
from tests.hubs.conftest import HF_REPO, MS_REPO, WEIGHTS, spec
from tests.hubs.helpers import server_of
from tests.service import file_sizes, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from emb_model_provider.settings import HubSettings
    from tests.hubs.servers import HuggingFaceServer, ModelScopeServer

ROOT = Path(__file__).parents[2]

CHILD = """
import ctypes, json, logging, os, sys
from pathlib import Path

name, settings, unprivileged = json.loads(sys.argv[1])
if unprivileged and os.getuid() == 0:
    # Permissions do not apply to root. Without its capabilities it is an owner like any other.
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    none = (ctypes.c_uint32 * 6)()
    assert ctypes.CDLL(None, use_errno=True).capset(header, none) == 0, os.strerror(ctypes.get_errno())

from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.model_spec import ModelSpec
from emb_model_provider.settings import HubSettings

logging.basicConfig(level=logging.INFO)
path = Path(name) if name.startswith("/") else None
try:
    snapshot = fetch_snapshot(ModelSpec(alias="a", name=name, path=path), HubSettings(**settings))
    print("SNAPSHOT", snapshot.hub, snapshot.digest)
except Exception as error:
    print("ERROR", type(error).__name__, error)
except KeyboardInterrupt:
    print("INTERRUPTED", flush=True)
"""

needs_permissions = pytest.mark.skipif(
    sys.platform != "linux" and os.geteuid() == 0, reason="permissions do not apply to root on this platform"
)


def start(
    name: str, config: HubSettings, *, unprivileged: bool = False, log: Path | None = None
) -> subprocess.Popen[str]:
    """Download in another process, whose last line of output is the result.

    Args:
        name: The model.
        config: The settings.
        unprivileged: File permissions apply to the process, even if the tests run as root.
        log: A file for its log lines; None: they are sent to stderr.
    """
    values = config.model_dump(mode="json", exclude_unset=True)
    with contextlib.nullcontext(subprocess.PIPE) if log is None else log.open("wb") as stderr:
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, json.dumps([name, values, unprivileged])],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_killed_download_leaves_no_manifest(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, modelscope: ModelScopeServer, repo: str
) -> None:
    """Its lock is free, and the next process completes the download."""
    server, weights = server_of(repo, huggingface, modelscope)
    config = settings()
    server.faults.hold_after[weights] = 120_000
    child = start(repo, config)
    wait_until(lambda: 120_000 in file_sizes(config.modelscope_cache_dir, "*.incomplete") or repo == HF_REPO)
    wait_until(lambda: server.bodies()[weights] == 1)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert not list(config.cache_dir.rglob("*.json"))

    server.faults.hold_after.clear()
    server.forget()
    snapshot = fetch_snapshot(spec(repo), config)
    assert (snapshot.path / weights).read_bytes() == WEIGHTS
    assert list(config.cache_dir.rglob("*.json"))
    if repo == MS_REPO:
        ranges = [request.headers.get("range") for request in server.requests if request.storage]
        assert ranges == ["bytes=120000-"]


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_interrupted_download_raises_at_once(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer, modelscope: ModelScopeServer, repo: str
) -> None:
    """Even if the hub sends nothing. What was downloaded is kept, with its journal."""
    server, weights = server_of(repo, huggingface, modelscope)
    config = settings()
    server.faults.hold_after[weights] = 120_000
    child = start(repo, config)
    wait_until(lambda: server.bodies()[weights] == 1)
    child.send_signal(signal.SIGINT)
    assert child.stdout is not None
    assert child.stdout.readline() == "INTERRUPTED\n"
    assert not server.faults.release.is_set()
    child.kill()
    child.communicate()
    assert not list(config.cache_dir.rglob("*.json"))
    assert list(config.cache_dir.rglob("*.pending"))


@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_two_processes_download_each_file_once(
    settings: Callable[..., HubSettings],
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
    tmp_path: Path,
    repo: str,
) -> None:
    """The second one waits, reports that, and uses the snapshot of the first one."""
    server, weights = server_of(repo, huggingface, modelscope)
    server.faults.hold_after[weights] = 1_000
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    children = [start(repo, settings(), log=log) for log in logs]

    def waiting() -> int:
        return sum("Another process or thread is downloading" in log.read_text(encoding="utf-8") for log in logs)

    try:
        wait_until(lambda: server.bodies()[weights] == 1 and waiting() == 1)
    finally:
        server.faults.release.set()
        outputs = [child.communicate(timeout=240)[0] for child in children]
    results = {output.splitlines()[-1] for output in outputs}
    assert len(results) == 1
    assert results.pop().startswith("SNAPSHOT")
    assert set(server.bodies().values()) == {1}
    assert server.asked("/revisions" if repo == MS_REPO else "/revision/main") == 1
    assert waiting() == 1


@needs_permissions
@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO, "local"])
def test_read_only_cache_is_served(
    settings: Callable[..., HubSettings],
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
    tmp_path: Path,
    repo: str,
) -> None:
    """A model without a manifest is an error that names the directory and the setting; a directory is served with a warning."""
    config = settings()
    name = repo
    if repo == "local":
        name = str(fetch_snapshot(spec(MS_REPO), config).path)
        config = settings(cache_dir=tmp_path / "nowhere")
    else:
        fetch_snapshot(spec(repo), config)
    huggingface.forget()
    modelscope.forget()
    with unwritable(tmp_path):
        output, errors = start(name, config, unprivileged=True).communicate(timeout=240)
        assert output.splitlines()[-1].startswith("SNAPSHOT"), output + errors
        assert not huggingface.requests + modelscope.requests
        if repo == "local":
            assert "will be computed at every start" in errors
            return
        huggingface.repos["acme/other"] = modelscope.repos["iic/other"] = {}
        other = "acme/other" if repo == HF_REPO else "iic/other"
        output, _ = start(other, config, unprivileged=True).communicate(timeout=240)
        assert "ERROR CacheNotWritableError" in output
        assert str(config.cache_dir) in output
        assert "EMB_PROVIDER_CACHE_DIR" in output


@needs_permissions
@pytest.mark.parametrize("repo", [HF_REPO, MS_REPO])
def test_read_only_cache_of_a_client_is_an_error_with_its_setting(
    settings: Callable[..., HubSettings], tmp_path: Path, repo: str
) -> None:
    config = settings()
    config.cache_dir.mkdir()
    clients = config.hf_cache_dir if repo == HF_REPO else config.modelscope_cache_dir
    clients.mkdir()
    with unwritable(clients):
        output, errors = start(repo, config, unprivileged=True).communicate(timeout=240)
    setting = "EMB_PROVIDER_HF_CACHE_DIR" if repo == HF_REPO else "EMB_PROVIDER_MODELSCOPE_CACHE_DIR"
    assert "ERROR CacheNotWritableError" in output, output + errors
    assert str(clients) in output
    assert setting in output


@contextlib.contextmanager
def unwritable(directory: Path) -> Iterator[None]:
    """Remove the permission to write below a directory."""
    paths = [directory, *(path for path in directory.rglob("*") if not path.is_symlink())]
    modes = {path: path.stat().st_mode for path in paths}
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode)
