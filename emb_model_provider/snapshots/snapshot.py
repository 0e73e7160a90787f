"""A snapshot: a complete, verified directory of model files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from emb_model_provider.errors import CorruptSnapshotError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from emb_model_provider.model_spec import HubName

_BLOCK = 1 << 20


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

    @classmethod
    def of(
        cls, hub: HubName, repository: str, revision: str, path: Path, files: Iterable[SnapshotFile]
    ) -> Snapshot:
        """Make a snapshot of files whose bytes the caller has just checked."""
        ordered = tuple(sorted(files, key=lambda file: file.path))
        return cls(hub, repository, revision, path, ordered, digest_of(ordered))


@dataclass(frozen=True, slots=True)
class Hashes:
    """What one reading of a file gives."""

    size: int
    sha256: str
    git_sha1: str | None
    """The id that git gives a blob of these bytes, where it was asked for."""


def digest_of(files: Iterable[SnapshotFile]) -> str:
    """The digest of a set of files, whatever their order and wherever they lie."""
    lines = sorted(f"{file.path}\0{file.size}\0{file.sha256}\n" for file in files)
    # A name that is not UTF-8 on the disk, of a directory of one's own, counts as the bytes that it is there.
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def hash_file(path: Path, *, git: bool = False) -> Hashes:
    """Read a file once and hash it, the way git does too if asked to.

    Raises: OSError.
    """
    sha256 = hashlib.sha256()
    git_sha1 = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False) if git else None
    size = 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            size += len(block)
            sha256.update(block)
            if git_sha1 is not None:
                git_sha1.update(block)
    return Hashes(size, sha256.hexdigest(), git_sha1.hexdigest() if git_sha1 is not None else None)


def is_safe_path(path: str) -> bool:
    """Whether a file of this name stays inside the directory it is put in, on any platform."""
    if not path or path.endswith("/") or any(char in path for char in "\\\0:"):
        return False
    parts = path.split("/")
    return not PurePosixPath(path).is_absolute() and not any(part in {"", ".", ".."} for part in parts)


def require_safe_paths(paths: Iterable[str], repository: str) -> None:
    """Refuse a repository that would write outside its own directory.

    Raises: CorruptSnapshotError.
    """
    for path in paths:
        if not is_safe_path(path):
            raise CorruptSnapshotError(
                f"Repository {repository} lists a file named {path!r}, which would lie outside its directory: "
                "nothing was downloaded. Do not use this repository; tell its owner."
            )
