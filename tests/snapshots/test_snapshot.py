"""Digests, hashes and paths of snapshots."""

from __future__ import annotations

import pytest

from emb_model_provider.snapshots.snapshot import is_safe_path


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
