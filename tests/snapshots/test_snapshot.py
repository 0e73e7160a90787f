"""Digests, hashes and paths of snapshots."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from emb_model_provider.snapshots.snapshot import Snapshot, SnapshotFile, digest_of, is_safe_path

FILES = (SnapshotFile("adapter_config.json", 10, "aa"), SnapshotFile("adapter_model.safetensors", 20, "bb"))
BASE = Snapshot.of("huggingface", "mirror/base", "c0ffee", Path("/base"), (SnapshotFile("config.json", 5, "cc"),))
ADAPTER = Snapshot.of("huggingface", "acme/lora", "badc0de", Path("/lora"), FILES)


@pytest.mark.parametrize(
    ("path", "safe"),
    [
        ("a.json", True),
        ("1_Pooling/config.json", True),
        ("..config", True),
        ("模型.json", True),
        ("", False),
        ("/a", False),
        ("../a", False),
        ("a/../../b", False),
        ("a/..", False),
        ("a//b", False),
        ("./a", False),
        ("a\\b", False),
        ("C:a", False),
        ("a\0", False),
        ("a/", False),
    ],
)
def test_safe_paths_stay_inside_the_directory(path: str, safe: bool) -> None:
    """Absolute paths, `..`, and names that have a meaning on another platform are not safe."""
    assert is_safe_path(path) is safe


def test_digest_covers_the_dependencies() -> None:
    """Other bytes of a dependency, or another dependency, are another digest."""
    other = replace(BASE, digest="other")
    composed = [ADAPTER.with_dependencies(each) for each in ({"a/base": BASE}, {"b/base": BASE}, {"a/base": other})]

    assert len({snapshot.digest for snapshot in (ADAPTER, *composed)}) == 4
    assert composed[0].with_dependencies({}) == ADAPTER


def test_digest_of_a_snapshot_without_dependencies_is_that_of_its_files() -> None:
    """Manifests and compiled models of earlier versions stay valid."""
    assert ADAPTER.digest == digest_of(FILES)


def test_dependencies_are_found_by_their_names_in_the_files() -> None:
    """A hub can have another name for a repository."""
    snapshot = ADAPTER.with_dependencies({"acme/base": BASE})

    assert snapshot.dependency("acme/base") == replace(BASE, required_as="acme/base")
    assert snapshot.dependency("mirror/base") is None
    assert snapshot.size == 35
    assert snapshot.directories == {Path("/base"), Path("/lora")}
