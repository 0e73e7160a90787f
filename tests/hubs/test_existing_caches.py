"""Caches that the clients made themselves, now or years ago: found and used, not fetched again."""

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


def write(directory: Path, files: dict[str, bytes]) -> None:
    for name, body in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)


def test_what_the_hugging_face_client_fetched_is_used(
    settings: Callable[..., HubSettings], huggingface: HuggingFaceServer
) -> None:
    """After the client's own snapshot_download no file's bytes are asked for, and the same directory is served."""
    from huggingface_hub import snapshot_download

    config = settings()
    theirs = snapshot_download(HF_REPO, cache_dir=config.hf_cache_dir, endpoint=huggingface.url)
    huggingface.forget()
    snapshot = fetch_snapshot(spec(HF_REPO), config)
    assert str(snapshot.path) == theirs
    assert not huggingface.bodies()


def test_what_the_modelscope_client_fetched_is_used(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """The same with ModelScope's client, in the layout it has now."""
    from modelscope_hub import HubApi, HubConfig

    config = settings()
    api = HubApi(HubConfig(endpoint=modelscope.url, cache_dir=config.modelscope_cache_dir))
    theirs = api.download_repo(MS_REPO, "model", cache_dir=config.modelscope_cache_dir)
    modelscope.forget()
    snapshot = fetch_snapshot(spec(MS_REPO), config)
    assert snapshot.path == theirs
    assert not modelscope.bodies()


@pytest.mark.parametrize("layout", OLDER_LAYOUTS)
def test_a_cache_of_an_older_modelscope_client_is_used(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer, layout: str
) -> None:
    """A repository where older clients put it is verified against the hub's hashes and served from there."""
    config = settings()
    modelscope.repos[DOTTED] = modelscope_files()
    write(config.modelscope_cache_dir / layout, modelscope_files())
    snapshot = fetch_snapshot(spec(DOTTED), config)
    assert snapshot.path == config.modelscope_cache_dir / layout
    assert not modelscope.bodies()
    assert not list(config.modelscope_cache_dir.rglob("snapshots"))


def test_of_an_older_cache_only_what_is_missing_or_wrong_is_fetched(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """A file that is not there, and one with other bytes of the same size, are fetched; the weights are not."""
    config = settings()
    modelscope.repos[DOTTED] = modelscope_files()
    older = config.modelscope_cache_dir / "hub" / DOTTED
    write(older, {**modelscope_files(), "vocab.txt": b"[PAD]\n[XXX]\n"})
    (older / "README.md").unlink()
    snapshot = fetch_snapshot(spec(DOTTED), config)
    assert dict(modelscope.bodies()) == {"vocab.txt": 1, "README.md": 1}
    assert (snapshot.path / "vocab.txt").read_bytes() == modelscope_files()["vocab.txt"]


def test_another_version_in_an_older_cache_is_left_as_it_is(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer
) -> None:
    """Where an older directory has a file of another size, it is another version: nothing is written into it."""
    config = settings()
    modelscope.repos[DOTTED] = modelscope_files()
    older = config.modelscope_cache_dir / "hub" / DOTTED
    write(older, {**modelscope_files(), "vocab.txt": b"[PAD]\n"})
    snapshot = fetch_snapshot(spec(DOTTED), config)
    assert not snapshot.path.is_relative_to(older)
    assert (older / "vocab.txt").read_bytes() == b"[PAD]\n"
    assert (snapshot.path / "pytorch_model.bin").read_bytes() == WEIGHTS


@pytest.mark.parametrize("layout", ["models/iic--tiny/snapshots/master", "hub/iic/tiny"])
def test_offline_names_the_directory_that_is_there(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer, layout: str
) -> None:
    """What ModelScope's client left cannot be checked offline; the error says which setting serves it as it is."""
    config = settings(offline=True)
    there = config.modelscope_cache_dir / layout
    write(there, modelscope_files())
    with pytest.raises(OfflineError, match="EMB_PROVIDER_MODEL_PATH=") as raised:
        fetch_snapshot(spec(MS_REPO), config)
    assert f"EMB_PROVIDER_MODEL_PATH={there}," in str(raised.value)
    assert not modelscope.requests
    assert fetch_snapshot(spec("x", path=there), config).hub == "local"


THEIRS_THEN_OURS = """
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
def test_a_cache_where_the_client_has_it_is_used(
    huggingface: HuggingFaceServer,
    modelscope: ModelScopeServer,
    tmp_path: Path,
    hub: str,
    variable: str | None,
) -> None:
    """With the client's own variables alone, or none, its files are found where it put them, and not fetched again."""
    server, repo = (huggingface, HF_REPO) if hub == "huggingface" else (modelscope, MS_REPO)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("EMB_PROVIDER_")}
    environ |= {"HOME": str(tmp_path), "HF_ENDPOINT": huggingface.url, "MODELSCOPE_ENDPOINT": modelscope.url}
    environ |= {"MODEL_HUB": hub, "PYTHONPATH": str(ROOT)}
    if variable is not None:
        environ[variable] = str(tmp_path / "chosen")
    said = subprocess.check_output(
        [sys.executable, "-c", THEIRS_THEN_OURS, hub, repo], cwd=tmp_path, env=environ, text=True, timeout=240
    )
    theirs, ours = said.splitlines()[-2:]
    assert theirs == ours
    assert ours.startswith(str(tmp_path / ("chosen" if variable else ".cache")))
    assert set(server.bodies().values()) == {1}


def test_a_cache_that_was_moved_with_its_layout_is_used(
    settings: Callable[..., HubSettings], modelscope: ModelScopeServer, tmp_path: Path
) -> None:
    """A cache directory that was moved, as the guide says, is used at its new place without a transfer."""
    before = settings()
    first = fetch_snapshot(spec(MS_REPO), before)
    shutil.move(before.modelscope_cache_dir, tmp_path / "moved")
    modelscope.forget()
    second = fetch_snapshot(spec(MS_REPO), settings(modelscope_cache_dir=tmp_path / "moved"))
    assert second.digest == first.digest
    assert second.path.is_relative_to(tmp_path / "moved")
    assert not modelscope.bodies()
