"""What an interrupted download has left in a client's cache."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from emb_model_provider.hubs.caches import contents, leftovers, remove_leftovers, repository_dirs
from emb_model_provider.snapshots import journal, manifest
from emb_model_provider.snapshots.manifest import ManifestKey
from emb_model_provider.snapshots.snapshot import Snapshot, SnapshotFile, hash_file
from tests.hubs.conftest import HF_REPO, MS_REPO
from tests.hubs.helpers import files_below, write_files

if TYPE_CHECKING:
    from pathlib import Path

HF_KEY = ManifestKey("huggingface", HF_REPO)
MS_KEY = ManifestKey("modelscope", MS_REPO)


def begin(key: ManifestKey, root: Path, manifest_dir: Path) -> journal.Journal:
    locations = [(root, path) for path in repository_dirs(key.hub, key.repository, root)]
    before = contents(key.hub, key.repository, root)
    return journal.begin(key, "fetch", locations, manifest_dir, before=before)


def link(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def save_manifest(key: ManifestKey, directory: Path, manifest_dir: Path) -> None:
    file = SnapshotFile("config.json", 2, hash_file(directory / "config.json").sha256)
    snapshot = Snapshot.of(key.hub, key.repository, "any", directory, [file])
    manifest.save(key, snapshot, manifest_dir)


def test_later_changes_are_those_of_other_programs(tmp_path: Path) -> None:
    """A snapshot in which a file was changed after the process had ended is kept as a whole."""
    root = tmp_path / "ms"
    begin(MS_KEY, root, tmp_path / "snapshots")
    snapshot = root / "models" / "iic--tiny" / "snapshots" / "v1"
    write_files(snapshot, {"config.json": b"{}", "vocab.txt.incomplete": b"half"})
    path = MS_KEY.journal_path(tmp_path / "snapshots")
    long_ago = time.time() - 3600
    os.utime(path, (long_ago, long_ago))
    found = journal.load(path)
    assert found is not None
    assert not leftovers(found, []).paths
    assert remove_leftovers(found, tmp_path / "snapshots") == 0
    assert len(files_below(snapshot)) == 2
    assert not path.exists()


def test_complete_snapshot_of_a_branch_with_a_slash_is_kept(tmp_path: Path) -> None:
    """Two branches share a directory; the download of one was interrupted, and the other was downloaded later."""
    root = tmp_path / "ms"
    written = begin(MS_KEY, root, tmp_path / "snapshots")
    snapshots = root / "models" / "iic--tiny" / "snapshots"
    write_files(snapshots / "dev" / "a", {"config.json": b"{}"})
    write_files(snapshots / "dev" / "b", {"vocab.txt.incomplete": b"half"})
    save_manifest(ManifestKey("modelscope", MS_REPO, "dev/a"), snapshots / "dev" / "a", tmp_path / "snapshots")
    remove_leftovers(written, tmp_path / "snapshots")
    assert files_below(root) == {snapshots / "dev" / "a" / "config.json"}


def test_blobs_that_another_snapshot_uses_are_kept(tmp_path: Path) -> None:
    """A blob can be a link, too, to the store that the Hugging Face client shares between repositories.

    A blob that no snapshot uses, and the client's temporary files, are removed.
    """
    root = tmp_path / "hf"
    written = begin(HF_KEY, root, tmp_path / "snapshots")
    repository = root / "models--acme--tiny"
    write_files(root / "blobs" / "ab", {"store": b"weights"})
    write_files(repository / "blobs", {"1": b"{}", "2": b"new", "3": b"unused", "tmp_4": b"", "5.incomplete": b"?"})
    link(repository / "blobs" / "6", "../../blobs/ab/store")
    for commit, blobs in {"aaaa": ("1", "6"), "bbbb": ("1", "2", "6")}.items():
        for name, blob in zip(("config.json", "weights", "other"), blobs, strict=False):
            link(repository / "snapshots" / commit / name, f"../../blobs/{blob}")
    save_manifest(HF_KEY, repository / "snapshots" / "aaaa", tmp_path / "snapshots")
    left = leftovers(written, [repository / "snapshots" / "aaaa"])
    assert left.snapshots == (repository / "snapshots" / "bbbb",)
    assert {path.name for path in left.files} == {"2", "3", "tmp_4", "5.incomplete"}
    assert remove_leftovers(written, tmp_path / "snapshots") == len("new") + len("unused") + len("?")
    assert {path.name for path in files_below(repository)} == {"1", "6", "config.json", "weights"}
    assert (repository / "snapshots" / "aaaa" / "weights").read_bytes() == b"weights"


def test_empty_directories_that_existed_before_are_kept(tmp_path: Path) -> None:
    """The client of another program has just created them for its own download."""
    root = tmp_path / "hf"
    theirs = root / "models--acme--tiny" / "snapshots" / "aaaa"
    theirs.mkdir(parents=True)
    written = begin(HF_KEY, root, tmp_path / "snapshots")
    (theirs.parent / "bbbb").mkdir()
    remove_leftovers(written, tmp_path / "snapshots")
    assert files_below(root) == {theirs}
