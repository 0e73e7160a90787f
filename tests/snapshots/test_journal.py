"""Journals: their format, and how those of earlier versions are read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from emb_model_provider.hubs.caches import contents, leftovers, remove_leftovers, repository_dirs
from emb_model_provider.snapshots import journal
from emb_model_provider.snapshots.manifest import ManifestKey
from tests.hubs.conftest import MS_REPO, modelscope_files
from tests.hubs.helpers import files_below, write_files
from tests.snapshots.helpers import ENDPOINT, read_sample, write_json

if TYPE_CHECKING:
    from pathlib import Path

KEY = ManifestKey("modelscope", MS_REPO, "v1", ENDPOINT)


@pytest.fixture
def before(tmp_path: Path) -> set[Path]:
    """Create the files that existed before the download of the sample, and return them."""
    snapshots = tmp_path / "ms" / "models" / "iic--tiny" / "snapshots"
    files = modelscope_files()
    del files["resources/dual-encoder.png"]
    write_files(snapshots / "master", files)
    write_files(snapshots / "v0", {"config.json": b"{}"})
    return files_below(tmp_path / "ms")


def begin(root: Path, manifest_dir: Path) -> journal.Journal:
    locations = [(root, path) for path in repository_dirs("modelscope", MS_REPO, root)]
    return journal.begin(KEY, "fetch", locations, manifest_dir, before=contents("modelscope", MS_REPO, root))


def test_journal_of_a_download_by_an_earlier_version(tmp_path: Path, before: set[Path]) -> None:
    """What the download began is removed; other programs' files and complete snapshots are kept."""
    manifest_dir = tmp_path / "cache" / "snapshots"
    write_json(KEY.journal_path(manifest_dir), read_sample("journal-download.json", tmp_path))
    begun = tmp_path / "ms" / "models" / "iic--tiny" / "snapshots" / "v1"
    write_files(begun, {"README.md": b"# tiny", "pytorch_model.bin.incomplete": b"half"})
    write_files(begun.with_name("v0"), {"vocab.txt.incomplete": b"half"})
    (found,) = journal.load_all(manifest_dir)
    assert (found.key, found.operation, found.roots, found.path) == (KEY, "fetch", (tmp_path / "ms",), None)
    left = leftovers(found, [])
    assert left.snapshots == (begun,)
    assert left.size == 14
    assert remove_leftovers(found, manifest_dir) == 14
    assert files_below(tmp_path / "ms") == before
    assert not journal.load_all(manifest_dir)


def test_journal_of_a_removal_by_an_earlier_version(tmp_path: Path, before: set[Path]) -> None:
    manifest_dir = tmp_path / "cache" / "snapshots"
    key = ManifestKey("modelscope", MS_REPO, None, ENDPOINT)
    write_json(key.journal_path(manifest_dir), read_sample("journal-removal.json", tmp_path))
    (found,) = journal.load_all(manifest_dir)
    directory = tmp_path / "ms" / "models" / "iic--tiny" / "snapshots" / "master"
    assert (found.key, found.operation, found.path) == (key, "remove", directory)
    assert not leftovers(found, []).paths
    assert before


def test_new_journal_can_be_read_by_an_earlier_version(tmp_path: Path, before: set[Path]) -> None:
    """It differs only in the parent directories and the directory of the client's locks, which are optional."""
    root = tmp_path / "ms"
    begin(root, tmp_path / "snapshots")
    written = json.loads(KEY.journal_path(tmp_path / "snapshots").read_bytes())
    expected = read_sample("journal-download.json", tmp_path)
    expected["places"].remove([str(root), str(root / ".lock")])
    expected["before"].remove(f"{root}/models/")
    assert written == expected
    assert before


def test_journal_survives_a_round_trip(tmp_path: Path, before: set[Path]) -> None:
    begun = begin(tmp_path / "ms", tmp_path / "snapshots")
    (found,) = journal.load_all(tmp_path / "snapshots")
    assert (found.key, found.roots, found.before) == (begun.key, begun.roots, begun.before)
    assert before <= found.before


@pytest.mark.parametrize(
    "change", [{"version": 9}, {"asked_revision": "v2"}, {"before": None}, {"repository": "../../iic"}]
)
def test_invalid_journal_is_ignored(tmp_path: Path, change: dict[str, object]) -> None:
    content = read_sample("journal-download.json", tmp_path) | change
    write_json(KEY.journal_path(tmp_path / "snapshots"), content)
    assert not journal.load_all(tmp_path / "snapshots")
