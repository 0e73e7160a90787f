"""Journals: records on disk of a download or a removal that has begun and not ended.

A journal that is left on disk belongs to work that was interrupted. It lists everything that existed before in the
directories of the repository: those files belong to other programs or to complete snapshots, and so does everything that
changed after the journal was last touched.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from emb_model_provider.snapshots.files import list_dir, walk, write_atomically
from emb_model_provider.snapshots.manifest import ManifestKey

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

logger = logging.getLogger(__name__)

_VERSION = 1
_TOUCH_EVERY_S = 2.0
_SLACK_S = 15.0
"""How long after the last touch a change can still be the process's own."""


@dataclass(slots=True)
class Journal:
    """Work on one snapshot that is in progress, or was interrupted."""

    key: ManifestKey
    operation: Literal["fetch", "remove"]
    roots: tuple[Path, ...]
    """The caches that it changes."""
    before: frozenset[Path]
    """Of a download: files, links and directories that existed when it began."""
    path: Path | None
    """Of a removal: the directory of the snapshot."""
    touched: float
    """Unix time in seconds at which the process last reported that it works."""
    _written: float = field(default=0.0, compare=False)

    def touch(self, manifest_dir: Path, *, now: bool = False) -> None:
        """Report that the work goes on, with `now` at once. Cheap enough to call for each block of bytes."""
        self.touched = time.time()
        if now or self.touched - self._written >= _TOUCH_EVERY_S:
            self._written = self.touched
            with contextlib.suppress(OSError):
                os.utime(self.key.journal_path(manifest_dir))

    def delete(self, manifest_dir: Path) -> None:
        self.key.journal_path(manifest_dir).unlink(missing_ok=True)

    def is_own_change(self, path: Path) -> bool:
        """Return whether the process of this journal can have made the last change of a file."""
        try:
            return path.lstat().st_ctime <= self.touched + _SLACK_S
        except OSError:
            return True

    def changed_by_others(self, directory: Path) -> bool:
        """Return whether a file in a directory was changed after the process of this journal had ended."""
        files = (path for path in walk(directory) if path.is_symlink() or path.is_file())
        return any(not self.is_own_change(path) for path in files)


def begin(
    key: ManifestKey,
    operation: Literal["fetch", "remove"],
    locations: Sequence[tuple[Path, Path]],
    manifest_dir: Path,
    *,
    before: Iterable[Path] = (),
    path: Path | None = None,
) -> Journal:
    """Write a journal, before the first change. The caller holds the repository's lock.

    `locations` are the cache and the directory of each place that can contain files of the repository; `before` and
    `path` are those of `Journal`.
    """
    existing = frozenset(before)
    content: dict[str, Any] = {
        "version": _VERSION,
        **key.as_json(),
        "doing": operation,
        "places": [[str(root), str(directory)] for root, directory in locations],
        "before": sorted(map(_before_entry, existing)),
        "path": str(path) if path is not None else None,
    }
    write_atomically(key.journal_path(manifest_dir), json.dumps(content, indent=1).encode())
    roots = tuple(dict.fromkeys(root for root, _ in locations))
    return Journal(key, operation, roots, existing, path, time.time())


def load(path: Path) -> Journal | None:
    """Return a journal, or None if there is none or it is invalid."""
    try:
        return _parse(path, json.loads(path.read_bytes()), path.stat().st_mtime)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("The journal %s is invalid and is ignored: %s", path, error)
        return None


def load_all(manifest_dir: Path) -> list[Journal]:
    paths = (path for directory in list_dir(manifest_dir) for path in list_dir(directory, "*.pending"))
    return [journal for path in paths if (journal := load(path)) is not None]


def _before_entry(path: Path) -> str:
    return f"{path}/" if path.is_dir() and not path.is_symlink() else str(path)


def _parse(path: Path, content: Any, touched: float) -> Journal:
    if content["version"] != _VERSION:
        raise ValueError(f"unknown version {content['version']}")
    key = ManifestKey.from_json(content)
    if path != key.journal_path(path.parents[1]):
        raise ValueError("its name does not match its key")
    return Journal(
        key=key,
        operation="remove" if content["doing"] == "remove" else "fetch",
        roots=tuple(dict.fromkeys(Path(root) for root, _ in content["places"])),
        before=frozenset(map(Path, content["before"])),
        path=Path(content["path"]) if content["path"] else None,
        touched=touched,
    )
