"""Manifests: their format, and what they say about the files of a snapshot."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.snapshots import manifest
from emb_model_provider.snapshots.manifest import FilePatterns, ManifestKey
from emb_model_provider.snapshots.snapshot import Snapshot, SnapshotFile, hash_file
from tests.hubs.conftest import MS_REPO, modelscope_files
from tests.hubs.helpers import write_files
from tests.snapshots.helpers import ENDPOINT, read_sample, write_json

if TYPE_CHECKING:
    from emb_model_provider.snapshots.manifest import Manifest

KEY = ManifestKey("modelscope", MS_REPO, None, ENDPOINT)


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    """Return a snapshot of two files."""
    directory = tmp_path / "ms"
    write_files(directory, {"config.json": b"{}", "weights.bin": b"weights"})
    files = [SnapshotFile(path.name, path.stat().st_size, hash_file(path).sha256) for path in directory.iterdir()]
    return Snapshot.of("modelscope", MS_REPO, "master", directory, files)


def load(manifest_dir: Path) -> Manifest:
    found = manifest.load(KEY, manifest_dir)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("key", "stem", "lock"),
    [
        (
            ManifestKey("huggingface", "acme/tiny"),
            "acme--tiny--6d04413fdf04a06f",
            "huggingface/acme--tiny--7b6bc50128ec7756.lock",
        ),
        (
            ManifestKey("huggingface", "acme/tiny", "v1", "https://hub.example/"),
            "acme--tiny--8490fd412416ccd2",
            "huggingface/acme--tiny--7b6bc50128ec7756.lock",
        ),
        (
            ManifestKey("modelscope", "iic/tiny", patterns=FilePatterns(("*.json",), ("a/*",))),
            "iic--tiny--2ece89783d569e2e",
            "modelscope/iic--tiny--a20a262a56e73119.lock",
        ),
        (ManifestKey("local", "/models/模型"), "models--2de3af4078f2738c", "local/models--6f60d94bc8572ebf.lock"),
    ],
)
def test_file_names_are_those_of_earlier_versions(key: ManifestKey, stem: str, lock: str) -> None:
    assert key.stem == stem
    assert key.lock_path(Path()) == Path(lock)


def test_manifest_of_an_earlier_version_is_valid(tmp_path: Path) -> None:
    """Its snapshot is used without hashing a file, and the file that is written is the same, but for the selection."""
    content = read_sample("manifest.json", tmp_path)
    directory = Path(content["path"])
    write_files(directory, modelscope_files())
    for file in content["files"]:
        os.utime(directory / file["path"], ns=(file["mtime_ns"], file["mtime_ns"]))
    path = KEY.manifest_path(tmp_path / "snapshots")
    write_json(path, content)
    hashed: list[int] = []
    snapshot = manifest.load_verified(KEY, tmp_path / "snapshots", lambda done, _: hashed.append(done))
    assert snapshot is not None
    assert (snapshot.path, snapshot.revision, snapshot.digest) == (directory, "master", content["digest"])
    assert not hashed
    assert [key for key, _ in manifest.load_all(tmp_path / "snapshots")] == [KEY]
    manifest.save(KEY, snapshot, tmp_path / "snapshots", fetched=content["fetched"])
    assert json.loads(path.read_bytes()) == {**content, "selection": 2}


def test_selection_of_an_earlier_version_is_not_used_for_variants(snapshot: Snapshot, tmp_path: Path) -> None:
    """It left out the weights that the libraries read."""
    variant = replace(snapshot.files[0], path="model.fp16.safetensors")
    (snapshot.path / variant.path).write_bytes((snapshot.path / snapshot.files[0].path).read_bytes())
    files = [*snapshot.files, variant]
    manifest.save(KEY, Snapshot.of("modelscope", MS_REPO, "master", snapshot.path, files), tmp_path / "snapshots")
    assert manifest.load_verified(KEY, tmp_path / "snapshots") is not None
    path = KEY.manifest_path(tmp_path / "snapshots")
    content = json.loads(path.read_bytes())
    del content["selection"]
    write_json(path, content)
    assert manifest.load_verified(KEY, tmp_path / "snapshots") is None


def test_changed_time_stamp_is_recorded_after_hashing(snapshot: Snapshot, tmp_path: Path) -> None:
    manifest.save(KEY, snapshot, tmp_path / "snapshots", fetched=1.0)
    os.utime(snapshot.path / "weights.bin", ns=(5, 5))
    hashed: list[tuple[int, int]] = []
    for _ in range(2):
        assert manifest.load_verified(KEY, tmp_path / "snapshots", lambda *count: hashed.append(count)) == snapshot
    assert hashed == [(7, 7)]
    assert load(tmp_path / "snapshots").mtimes["weights.bin"] == 5
    assert load(tmp_path / "snapshots").fetched == 1.0


def test_file_that_changes_while_it_is_verified_is_hashed_again(snapshot: Snapshot, tmp_path: Path) -> None:
    """The time stamp that is recorded is the one before the file was read."""
    manifest.save(KEY, snapshot, tmp_path / "snapshots")
    os.utime(snapshot.path / "weights.bin", ns=(5, 5))

    def replace(_done: int, _total: int) -> None:
        (snapshot.path / "weights.bin").write_bytes(b"WEIGHTS")

    assert manifest.load_verified(KEY, tmp_path / "snapshots", replace) == snapshot
    assert manifest.load_verified(KEY, tmp_path / "snapshots") is None


def test_verification_does_not_replace_a_newer_manifest(snapshot: Snapshot, tmp_path: Path) -> None:
    """Another process downloads a newer state of the branch while the files are hashed."""
    manifest.save(KEY, snapshot, tmp_path / "snapshots")
    os.utime(snapshot.path / "weights.bin", ns=(5, 5))
    newer = Snapshot.of("modelscope", MS_REPO, "master", snapshot.path, snapshot.files[:1])

    def update(_done: int, _total: int) -> None:
        manifest.save(KEY, newer, tmp_path / "snapshots")

    assert manifest.load_verified(KEY, tmp_path / "snapshots", update) == snapshot
    assert load(tmp_path / "snapshots").snapshot == newer


def test_missing_file_is_noticed_before_files_are_hashed(snapshot: Snapshot, tmp_path: Path) -> None:
    manifest.save(KEY, snapshot, tmp_path / "snapshots")
    os.utime(snapshot.path / "config.json", ns=(5, 5))
    (snapshot.path / "weights.bin").unlink()
    hashed: list[int] = []
    assert manifest.load_verified(KEY, tmp_path / "snapshots", lambda done, _: hashed.append(done)) is None
    assert not hashed


def test_invalidated_file_is_hashed_again(snapshot: Snapshot, tmp_path: Path) -> None:
    """Until it was hashed, the manifest reports that a file is known to be wrong."""
    manifest.save(KEY, snapshot, tmp_path / "snapshots")
    manifest.invalidate(KEY, load(tmp_path / "snapshots"), ["config.json"], tmp_path / "snapshots")
    assert load(tmp_path / "snapshots").is_invalidated
    hashed: list[tuple[int, int]] = []
    assert manifest.load_verified(KEY, tmp_path / "snapshots", lambda *count: hashed.append(count))
    assert hashed == [(2, 2)]
    assert not load(tmp_path / "snapshots").is_invalidated
