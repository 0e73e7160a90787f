"""Files that the hubs' clients have downloaded themselves, with current and older versions."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import OfflineError
from emb_model_provider.hubs.fetch import fetch_snapshot
from tests.hubs.conftest import HF_REPO, MS_REPO, WEIGHTS, modelscope_files, spec
from tests.hubs.helpers import write_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.settings import HubSettings
    from tests.hubs.servers import HuggingFaceServer, ModelScopeServer

ROOT = Path(__file__).parents[2]
DOTTED = "iic/tiny-v1.5"
OLDER_LAYOUTS = [
    "hub/models/iic/tiny-v1___5",
    "models/iic/tiny-v1___5",
    "hub/iic/tiny-v1___5",
    "iic/tiny-v1___5",
    "hub/models/iic/tiny-v1.5",
    "iic/tiny-v1.5",
]


def test_download_of_the_hugging_face_client_is_used(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    """Its directory is served, and no file is downloaded."""
    from huggingface_hub import snapshot_download

    config = settings()
    directory = snapshot_download(HF_REPO, cache_dir=config.hf_cache_dir, endpoint=huggingface.url)
    huggingface.forget()
    snapshot = fetch_snapshot(spec(HF_REPO), config)
    assert str(snapshot.path) == directory
    assert not huggingface.bodies()


def test_download_of_the_modelscope_client_is_used(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    from modelscope_hub import HubApi, HubConfig

    config = settings()
    api = HubApi(HubConfig(endpoint=modelscope.url, cache_dir=config.modelscope_cache_dir))
    directory = api.download_repo(MS_REPO, "model", cache_dir=config.modelscope_cache_dir)
    modelscope.forget()
    snapshot = fetch_snapshot(spec(MS_REPO), config)
    assert snapshot.path == directory
    assert not modelscope.bodies()


@pytest.mark.parametrize("layout", OLDER_LAYOUTS)
def test_download_of_an_older_modelscope_client_is_used(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer, layout: str
) -> None:
    """It is verified against the hub's hashes and served from its directory."""
    config = settings()
    modelscope.repos[DOTTED] = modelscope_files()
    write_files(config.modelscope_cache_dir / layout, modelscope_files())
    snapshot = fetch_snapshot(spec(DOTTED), config)
    assert snapshot.path == config.modelscope_cache_dir / layout
    assert not modelscope.bodies()
    assert not list(config.modelscope_cache_dir.rglob("snapshots"))


def test_missing_and_wrong_files_of_an_older_cache_are_downloaded(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    config = settings()
    modelscope.repos[DOTTED] = modelscope_files()
    older = config.modelscope_cache_dir / "hub" / DOTTED
    write_files(older, {**modelscope_files(), "vocab.txt": b"[PAD]\n[XXX]\n"})
    (older / "README.md").unlink()
    snapshot = fetch_snapshot(spec(DOTTED), config)
    assert dict(modelscope.bodies()) == {"vocab.txt": 1, "README.md": 1}
    assert (snapshot.path / "vocab.txt").read_bytes() == modelscope_files()["vocab.txt"]


def test_another_version_in_an_older_cache_is_not_changed(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """A file of another size shows that the directory contains another version."""
    config = settings()
    modelscope.repos[DOTTED] = modelscope_files()
    older = config.modelscope_cache_dir / "hub" / DOTTED
    write_files(older, {**modelscope_files(), "vocab.txt": b"[PAD]\n"})
    snapshot = fetch_snapshot(spec(DOTTED), config)
    assert not snapshot.path.is_relative_to(older)
    assert (older / "vocab.txt").read_bytes() == b"[PAD]\n"
    assert (snapshot.path / "pytorch_model.bin").read_bytes() == WEIGHTS


@pytest.mark.parametrize("layout", ["models/iic--tiny/snapshots/master", "hub/iic/tiny"])
def test_offline_error_names_the_directory_of_the_client(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer, layout: str
) -> None:
    """Its files cannot be checked offline; the error names the setting that serves them unchecked."""
    config = settings(offline=True)
    directory = config.modelscope_cache_dir / layout
    write_files(directory, modelscope_files())
    with pytest.raises(OfflineError, match="EMB_PROVIDER_MODEL_PATH=") as raised:
        fetch_snapshot(spec(MS_REPO), config)
    assert f"EMB_PROVIDER_MODEL_PATH={directory}," in str(raised.value)
    assert not modelscope.requests
    assert fetch_snapshot(spec("x", path=directory), config).hub == "local"


CLIENT_THEN_MANAGER = """
import os, sys
from emb_model_provider import get_model_manager

hub, repo = sys.argv[1:]
if hub == "huggingface":
    from huggingface_hub import snapshot_download

    print(snapshot_download(repo))
else:
    from modelscope_hub import HubApi

    print(HubApi().download_repo(repo, "model"))
os.environ["EMB_PROVIDER_CACHE_DIR"] = "own"
print(get_model_manager().ensure_model_cached(repo))
"""


@pytest.mark.parametrize(
    ("hub", "variable"),
    [
        ("huggingface", None),
        ("huggingface", "HF_HOME"),
        ("huggingface", "HF_HUB_CACHE"),
        ("modelscope", None),
        ("modelscope", "MODELSCOPE_CACHE"),
    ],
)
def test_cache_of_the_client_is_found(
    huggingface: HuggingFaceServer, modelscope: ModelScopeServer, tmp_path: Path, hub: str, variable: str | None
) -> None:
    """With the client's own variables, or none, its files are found and not downloaded again."""
    server, repo = (huggingface, HF_REPO) if hub == "huggingface" else (modelscope, MS_REPO)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("EMB_PROVIDER_")}
    environ |= {"HOME": str(tmp_path), "HF_ENDPOINT": huggingface.url, "MODELSCOPE_ENDPOINT": modelscope.url}
    environ |= {"MODEL_HUB": hub, "PYTHONPATH": str(ROOT)}
    if variable is not None:
        environ[variable] = str(tmp_path / "chosen")
    output = subprocess.check_output(
        [sys.executable, "-c", CLIENT_THEN_MANAGER, hub, repo], cwd=tmp_path, env=environ, text=True, timeout=240
    )
    by_client, by_manager = output.splitlines()[-2:]
    assert by_client == by_manager
    assert by_manager.startswith(str(tmp_path / ("chosen" if variable else ".cache")))
    assert set(server.bodies().values()) == {1}


def test_moved_cache_is_used(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer, tmp_path: Path
) -> None:
    before = settings()
    first = fetch_snapshot(spec(MS_REPO), before)
    shutil.move(before.modelscope_cache_dir, tmp_path / "moved")
    modelscope.forget()
    second = fetch_snapshot(spec(MS_REPO), settings(modelscope_cache_dir=tmp_path / "moved"))
    assert second.digest == first.digest
    assert second.path.is_relative_to(tmp_path / "moved")
    assert not modelscope.bodies()
