"""Directories as they are found: caches of the hubs' clients, links, stale files, and what is refused."""

from __future__ import annotations

import json
import logging
import shutil
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.errors import IncompleteRepositoryError
from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.settings import HubSettings
from tests.hubs.conftest import WEIGHTS, model_files, modelscope_files, spec
from tests.hubs.helpers import write_files

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.snapshots.snapshot import Snapshot

HASHES = ("1" * 40, "2" * 40)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 200000\n"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Return a directory that contains a model."""
    write_files(tmp_path / "model", model_files())
    return tmp_path / "model"


@pytest.fixture
def fetch(tmp_path: Path) -> Callable[[Path], Snapshot]:
    return lambda directory: fetch_snapshot(spec("x", path=directory), HubSettings(cache_dir=tmp_path / "cache"))


def write_huggingface_cache(root: Path, name: str, *commits: str, main: str | None = None) -> None:
    """Write a repository as the Hugging Face client keeps it: the files of a snapshot are links to blobs."""
    repo = root / f"models--{name.replace('/', '--')}"
    for commit in commits:
        for path, body in model_files().items():
            blob = repo / "blobs" / path.replace("/", "-")
            blob.parent.mkdir(parents=True, exist_ok=True)
            blob.write_bytes(body)
            link = repo / "snapshots" / commit / path
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
    if main is not None:
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(main)


# --- which directory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["", "hub", "hub/models--01-acme--tiny", "hub/models--01-acme--tiny/snapshots"])
def test_hugging_face_cache_with_one_model(fetch: Callable[[Path], Snapshot], tmp_path: Path, given: str) -> None:
    """The home of the client, its cache, and the directory of a repository lead to the snapshot."""
    write_huggingface_cache(tmp_path / "hf" / "hub", "01-acme/tiny", HASHES[0], main=HASHES[0])
    snapshot = fetch(tmp_path / "hf" / given)
    assert snapshot.path == tmp_path / "hf" / "hub" / "models--01-acme--tiny" / "snapshots" / HASHES[0]
    assert snapshot.repository == str(tmp_path / "hf" / given).rstrip("/")
    assert {"model.safetensors", "1_Pooling/config.json"} <= {file.path for file in snapshot.files}


def test_hugging_face_repository_with_several_snapshots(fetch: Callable[[Path], Snapshot], tmp_path: Path) -> None:
    """That of `main` is used; if it is not known, the error lists them all."""
    write_huggingface_cache(tmp_path / "hub", "acme/tiny", *HASHES, main=HASHES[1])
    repo = tmp_path / "hub" / "models--acme--tiny"
    assert fetch(repo).path.name == HASHES[1]
    shutil.rmtree(repo / "refs")
    with pytest.raises(IncompleteRepositoryError, match=rf"(?s)EMB_PROVIDER_MODEL_PATH.*{HASHES[0]}.*{HASHES[1]}"):
        fetch(repo)


@pytest.mark.parametrize(
    ("given", "layout"),
    [
        ("", "models/iic--tiny/snapshots/master"),
        ("models", "models/iic--tiny/snapshots/master"),
        ("models/iic--tiny", "models/iic--tiny/snapshots/master"),
        ("", "models/iic/tiny"),
        ("models/iic", "models/iic/tiny"),
        ("", "hub/models/iic/tiny"),
        ("", "hub/iic/tiny"),
        ("", "iic/tiny"),
        ("", "tiny"),
    ],
)
def test_modelscope_cache_with_one_model(
    fetch: Callable[[Path], Snapshot], tmp_path: Path, given: str, layout: str
) -> None:
    write_files(tmp_path / "ms" / layout, modelscope_files())
    assert fetch(tmp_path / "ms" / given).path == tmp_path / "ms" / layout


def test_link_of_the_modelscope_client_is_not_another_model(fetch: Callable[[Path], Snapshot], tmp_path: Path) -> None:
    """Older clients leave a link with dots next to a directory without dots."""
    write_files(tmp_path / "ms" / "iic" / "tiny-v1___5", modelscope_files())
    (tmp_path / "ms" / "iic" / "tiny-v1.5").symlink_to(tmp_path / "ms" / "iic" / "tiny-v1___5")
    assert fetch(tmp_path / "ms").path.resolve() == tmp_path / "ms" / "iic" / "tiny-v1___5"


def test_error_lists_the_models_of_a_directory(fetch: Callable[[Path], Snapshot], tmp_path: Path) -> None:
    """Checkpoints in the directory of a model are not models of their own."""
    for name in ("first", "second", "second/checkpoint-5"):
        write_files(tmp_path / "all" / name, model_files())
    with pytest.raises(IncompleteRepositoryError, match="contains several") as raised:
        fetch(tmp_path / "all")
    assert str(raised.value).splitlines()[1:] == [f"  {tmp_path}/all/first", f"  {tmp_path}/all/second"]


def test_incomplete_model_is_not_searched_for_others(fetch: Callable[[Path], Snapshot], directory: Path) -> None:
    """A module with weights is not the model, and neither is a copy of the model in a folder."""
    write_files(directory / "2_Dense", {"config.json": b"{}", "model.safetensors": WEIGHTS})
    write_files(directory / "backup", model_files())
    for name in ("config.json", "modules.json"):
        (directory / name).unlink()
    with pytest.raises(IncompleteRepositoryError, match=r"no config\.json"):
        fetch(directory)


# --- links --------------------------------------------------------------------------------------------


def test_linked_folder_is_part_of_the_digest(
    fetch: Callable[[Path], Snapshot], directory: Path, tmp_path: Path
) -> None:
    shutil.move(directory / "1_Pooling", tmp_path / "elsewhere")
    (directory / "1_Pooling").symlink_to(tmp_path / "elsewhere")
    first = fetch(directory)
    assert "1_Pooling/config.json" in {file.path for file in first.files}
    (tmp_path / "elsewhere" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    assert fetch(directory).digest != first.digest


def test_links_to_parent_directories_are_not_followed(fetch: Callable[[Path], Snapshot], directory: Path) -> None:
    plain = fetch(directory)
    (directory / "1_Pooling" / "self").symlink_to(directory)
    (directory / "above").symlink_to(directory.parent)
    assert fetch(directory) == plain


@pytest.mark.parametrize("name", ["README.md", "onnx/model.onnx", "pytorch_model.bin", "LICENSE"])
def test_broken_link_that_is_not_needed_is_ignored(
    fetch: Callable[[Path], Snapshot], directory: Path, name: str
) -> None:
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to("/nowhere/blob")
    assert name not in {file.path for file in fetch(directory).files}


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "1_Pooling/config.json", "vocab.txt"])
def test_broken_link_of_a_needed_file_is_an_error(
    fetch: Callable[[Path], Snapshot], directory: Path, name: str
) -> None:
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to("/nowhere/blob")
    with pytest.raises(
        IncompleteRepositoryError, match=f"{name} in .* is a link to /nowhere/blob, which does not exist"
    ):
        fetch(directory)


# --- which files --------------------------------------------------------------------------------------


def test_replaced_torch_weights_beside_a_variant_change_the_digest(
    fetch: Callable[[Path], Snapshot], directory: Path
) -> None:
    """transformers reads pytorch_model.bin, and not model.fp16.safetensors."""
    (directory / "model.safetensors").rename(directory / "model.fp16.safetensors")
    first = fetch(directory)
    (directory / "pytorch_model.bin").write_bytes(WEIGHTS)
    assert fetch(directory).digest != first.digest


def test_stale_index_is_ignored(fetch: Callable[[Path], Snapshot], directory: Path) -> None:
    plain = fetch(directory)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert fetch(directory) == plain


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_pointer_of_git_lfs_is_an_error(fetch: Callable[[Path], Snapshot], directory: Path, name: str) -> None:
    (directory / name).write_bytes(POINTER)
    with pytest.raises(IncompleteRepositoryError, match=f"{name} is only a pointer of Git LFS. Run `git lfs pull`"):
        fetch(directory)


@pytest.mark.parametrize(
    ("kind", "file"),
    [("Pooling", "config.json"), ("Dense", "config.json"), ("WordEmbeddings", "wordembedding_config.json")],
)
@pytest.mark.parametrize("package", ["sentence_transformers.models", "sentence_transformers.base.modules.any"])
def test_missing_folder_of_a_module_is_an_error(
    fetch: Callable[[Path], Snapshot], directory: Path, kind: str, file: str, package: str
) -> None:
    module = {"idx": 2, "name": "2", "path": f"2_{kind}", "type": f"{package}.{kind}"}
    (directory / "modules.json").write_text(json.dumps([{"path": ""}, module]))
    with pytest.raises(IncompleteRepositoryError, match=f"has no 2_{kind}/{file}, which its modules.json requires"):
        fetch(directory)


@pytest.mark.parametrize("kind", ["sentence_transformers.models.Normalize", "custom.Module", None])
def test_modules_that_need_no_folder(fetch: Callable[[Path], Snapshot], directory: Path, kind: str | None) -> None:
    (directory / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "2_Other", "type": kind}]))
    assert fetch(directory)


# --- a name that is a directory, too ------------------------------------------------------------------


def test_error_of_a_directory_with_the_name_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says how to get the model of a hub."""
    write_files(tmp_path / "BAAI" / "bge-m3", {"README.md": b""})
    monkeypatch.chdir(tmp_path)
    settings = HubSettings(cache_dir=tmp_path / "cache")
    with pytest.raises(IncompleteRepositoryError, match=r"BAAI/bge-m3 is a directory here.*SOURCE\) huggingface"):
        fetch_snapshot(spec("BAAI/bge-m3"), settings)
    with pytest.raises(IncompleteRepositoryError) as raised:
        fetch_snapshot(spec(str(tmp_path / "BAAI" / "bge-m3")), settings)
    assert "EMB_PROVIDER_MODEL_SOURCE" not in str(raised.value)


def test_log_names_the_model_in_a_directory(
    fetch: Callable[[Path], Snapshot], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_files(tmp_path / "models" / "tiny", model_files())
    with caplog.at_level(logging.INFO):
        fetch(tmp_path / "models")
    assert f"using the one in it: {tmp_path}/models/tiny" in caplog.text
