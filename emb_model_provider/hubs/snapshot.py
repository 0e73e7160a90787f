"""A snapshot: a complete, verified directory of model files, and the manifest that says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from emb_model_provider.hubs.base import HubName


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """One file of a snapshot."""

    path: str
    """Relative to the snapshot's directory, with forward slashes."""
    size: int
    """Bytes."""
    sha256: str
    """Lower-case hex."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A complete, verified directory of model files. Loading reads only the files named here."""

    hub: HubName
    """Where the files came from, which after a fallback is not the hub that was asked first."""
    repository: str
    revision: str
    """Resolved: a commit where the hub tells one, else the branch or tag; `local` for a directory."""
    path: Path
    files: tuple[SnapshotFile, ...]
    digest: str
    """sha256 over the sorted paths, sizes and hashes of all files: the same files, the same digest."""
