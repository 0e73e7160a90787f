"""Holds: what keeps a snapshot on the disk for as long as a process uses it.

A hold is a lock shared by all who use a snapshot, in any number of threads and processes; who removes the snapshot
has to have it alone. It ends with its process, however that ends, and leaves no file behind.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from typing import TYPE_CHECKING

from emb_model_provider.hubs.locks import Held, claim, is_held, remove_stale, share
from emb_model_provider.hubs.storage import listed

if TYPE_CHECKING:
    from pathlib import Path

SnapshotHold = Held
"""Keeps a snapshot from being removed until `release()`, which may be called again, or until the process ends."""


class SnapshotHolds:
    """The holds of one cache directory, by the directory of the snapshot."""

    def __init__(self, cache_dir: Path) -> None:
        self._directory = cache_dir / "holds"

    def hold(self, snapshot: Path) -> SnapshotHold:
        """Hold a snapshot together with others. Waits while it is being removed: look afterwards whether it is there."""
        return share(self._path(snapshot))

    def claim(self, snapshot: Path, *, wait_s: float = 0.0) -> SnapshotHold | None:
        """Have a snapshot alone, to remove it; None where it is in use for longer than `wait_s` seconds.

        Raises: OSError where the cache directory cannot be written.
        """
        return claim(self._path(snapshot), wait_s=wait_s)

    def is_held(self, snapshot: Path) -> bool:
        """Whether any process uses a snapshot now."""
        return is_held(self._path(snapshot))

    def sweep(self) -> None:
        """Remove what killed processes left."""
        for path in listed(self._directory, "*.hold"):
            remove_stale(path)

    def remove_empty_directory(self) -> None:
        with contextlib.suppress(OSError):
            self._directory.rmdir()

    def _path(self, snapshot: Path) -> Path:
        place = os.path.realpath(snapshot)
        readable = re.sub(r"[^A-Za-z0-9._-]+", "--", place)[-60:].strip("-.")
        return self._directory / f"{readable}--{hashlib.sha256(os.fsencode(place)).hexdigest()[:16]}.hold"
