"""A snapshot: a complete, verified directory of model files."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from emb_model_provider.model_spec import HubName

_BLOCK_SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """One file of a snapshot."""

    path: str
    """Relative to the snapshot's directory, with forward slashes."""
    size: int
    sha256: str
    """Lower-case hex."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A complete, verified directory of model files. Loading reads only the files that are listed here."""

    hub: HubName
    """The hub that the files came from, which after a fallback is not the one that was requested."""
    repository: str
    revision: str
    """Resolved: a commit if the hub reports one, else the branch or tag; `local` for a directory."""
    path: Path
    files: tuple[SnapshotFile, ...]
    digest: str
    """Of the files, and of the dependencies if there are any."""
    dependencies: tuple[Snapshot, ...] = ()
    """Snapshots of other repositories that loading reads too: the base model of an adapter, and repositories of code."""
    required_as: str = ""
    """Of a dependency: its name as the files that require it write it, which can differ from its name on the hub."""
    is_mirror: bool = False
    """Whether the files are in a mirror, in which all dependencies are, too. Then the hub is that of the original."""

    @classmethod
    def of(cls, hub: HubName, repository: str, revision: str, path: Path, files: Iterable[SnapshotFile]) -> Snapshot:
        """Create a snapshot of files that the caller has just hashed."""
        ordered = tuple(sorted(files, key=lambda file: file.path))
        return cls(hub, repository, revision, path, ordered, digest_of(ordered))

    @property
    def size(self) -> int:
        """The size of the files in bytes, those of the dependencies included."""
        return sum(file.size for file in self.files) + sum(each.size for each in self.dependencies)

    @property
    def directories(self) -> frozenset[Path]:
        """The directories of the files, those of the dependencies included."""
        return frozenset({self.path}).union(*(each.directories for each in self.dependencies))

    def with_dependencies(self, dependencies: Mapping[str, Snapshot]) -> Snapshot:
        """Return this snapshot with other dependencies, by their names as the files of this snapshot write them."""
        named = tuple(replace(each, required_as=name) for name, each in sorted(dependencies.items()))
        digest = digest_of(self.files)
        if named:
            lines = [digest, *(f"{each.required_as}\0{each.digest}" for each in named)]
            digest = hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
        return replace(self, dependencies=named, digest=digest)

    def dependency(self, name: str) -> Snapshot | None:
        """Return the dependency that the files of this snapshot call `name`."""
        return next((each for each in self.dependencies if each.required_as == name), None)


@dataclass(frozen=True, slots=True)
class Hashes:
    """Size and hashes of a file."""

    size: int
    sha256: str
    git_sha1: str | None
    """The id of the file as a git blob, if it was requested."""


def parts_of(snapshot: Snapshot) -> Iterator[Snapshot]:
    """Yield a snapshot, and all snapshots that it needs."""
    yield snapshot
    for each in snapshot.dependencies:
        yield from parts_of(each)


def digest_of(files: Iterable[SnapshotFile]) -> str:
    """Return the digest of a set of files, independent of their order and directory."""
    lines = sorted(f"{file.path}\0{file.size}\0{file.sha256}\n" for file in files)
    # A name in a local directory may not be valid UTF-8: it is hashed as the bytes that it has on disk.
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def hash_file(path: Path, *, git: bool = False) -> Hashes:
    """Read a file once and hash it, with `git` also as a git blob."""
    sha256 = hashlib.sha256()
    git_sha1 = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False) if git else None
    size = 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK_SIZE):
            size += len(block)
            sha256.update(block)
            if git_sha1 is not None:
                git_sha1.update(block)
    return Hashes(size, sha256.hexdigest(), git_sha1.hexdigest() if git_sha1 is not None else None)


def is_safe_path(path: str) -> bool:
    """Return whether a file of this name stays inside the directory it is written to, on every platform."""
    return not any(char in path for char in "\\\0:") and {"", ".", ".."}.isdisjoint(path.split("/"))
