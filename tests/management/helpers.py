"""Helpers of the manager's tests."""

from __future__ import annotations

import os
from pathlib import Path

_LOCKS = (".lock", ".hold")


def on_disk(directory: Path) -> dict[str, tuple[str, int]]:
    """Return everything below a directory except locks: its kind, and its size or the target of a link.

    Directories below the first level that contain only locks are left out, too.
    """
    found: dict[str, tuple[str, int]] = {}
    for parent, directories, names in os.walk(directory):
        for path in (Path(parent) / name for name in (*directories, *names)):
            if path.is_symlink():
                found[str(path)] = (os.readlink(path), 0)  # noqa: PTH115 - the text of the link
            elif path.is_file() and path.suffix not in _LOCKS:
                found[str(path)] = ("file", path.stat().st_size)
            elif path.is_dir() and (path.parent == directory or not _has_only_locks(path)):
                found[str(path)] = ("directory", 0)
    return found


def _has_only_locks(directory: Path) -> bool:
    paths = list(directory.rglob("*"))
    return any(path.suffix in _LOCKS for path in paths) and all(
        path.suffix in _LOCKS or path.is_dir() for path in paths
    )
