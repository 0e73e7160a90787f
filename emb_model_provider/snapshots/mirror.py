"""Mirrors: directories with a model and everything that it needs, for networks without a hub.

    DIR/mirror-manifest.json            every file with its size and hash, and where it came from; written last
    DIR/config.json, ...                the files of the model
    DIR/.dependencies/owner--name/...   the same for the base model of an adapter, and for code of other repositories

All paths in the manifest are relative, so that the directory can be copied anywhere. While a mirror is written its
manifest says that it is incomplete: an interrupted mirror is then not mistaken for a directory that a user made.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

from emb_model_provider.errors import CorruptSnapshotError, HubError, NotAllowedError
from emb_model_provider.model_spec import MIRROR_MANIFEST, HubName
from emb_model_provider.snapshots.files import (
    FileProblem,
    check_files,
    list_dir,
    remove_empty_parents,
    walk,
    write_atomically,
)
from emb_model_provider.snapshots.snapshot import Snapshot, SnapshotFile, is_safe_path, parts_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

DEPENDENCIES = ".dependencies"
"""Hidden, so that the files in it are not taken for files of the model."""

_FORMAT = "emb-provider-mirror"
_VERSION = 1
_TEMPORARY_MANIFESTS = ".mirror-manifest-*.tmp"
"""What a killed process leaves of `write_atomically`."""
_PARTIAL = ".{}.mirror-incomplete"
_BLOCK_SIZE = 1 << 20
_MAX_DEPTH = 3
"""An adapter needs a base model, which can need code of another repository."""


@dataclass(frozen=True, slots=True)
class Mirror:
    """What the manifest of a complete mirror says."""

    name: str
    """The name under which the model is served."""
    snapshot: Snapshot
    """The model in the directory of the mirror, with its dependencies. Its files need not exist or be unchanged."""
    created: datetime

    @property
    def files(self) -> list[SnapshotFile]:
        """All files, those of the dependencies included, relative to the directory of the mirror."""
        return _relative_files(self.snapshot)


@dataclass(frozen=True, slots=True)
class MirrorChanges:
    """What writing a mirror has changed."""

    copied: int
    """The number of files."""
    copied_bytes: int
    removed: tuple[str, ...]
    """Files of the earlier version that the new one does not have, relative to the directory."""


# --- reading ------------------------------------------------------------------------------------------


def is_mirror(directory: Path) -> bool:
    """Return whether a directory has the manifest of a mirror, complete or not."""
    return (directory / MIRROR_MANIFEST).is_file()


def read(directory: Path) -> Mirror | None:
    """Return what the manifest of a mirror says, or None if the directory has none. Reads no other file.

    Raises:
        CorruptSnapshotError: The mirror is incomplete, or its manifest is invalid.
    """
    content = _read_content(directory)
    if content is None:
        return None
    try:
        if content["complete"] is not True:
            raise CorruptSnapshotError(
                f"The mirror {directory} is incomplete: it was interrupted while it was written. Run the same command "
                f"again: `emb-provider mirror {content['name']} {directory}`."
            )
        return _parse_mirror(content, directory)
    except (ValueError, KeyError, TypeError) as error:
        raise _invalid(directory, error) from error


def check(mirror: Mirror, on_bytes: Callable[[int, int], None]) -> list[FileProblem]:
    """Hash all files of a mirror, and return those that are missing, changed, or not in the manifest.

    Args:
        mirror: The mirror.
        on_bytes: Called after each file, with the bytes that were hashed so far and those to hash.
    """
    directory = mirror.snapshot.path
    problems = check_files(directory, mirror.files, on_bytes=on_bytes).problems
    listed = {MIRROR_MANIFEST, *(file.path for file in mirror.files)}
    present = (path for path in walk(directory) if path.is_symlink() or not path.is_dir())
    left = set(list_dir(directory, _TEMPORARY_MANIFESTS))  # the next writer removes it
    extra = sorted({path.relative_to(directory).as_posix() for path in present if path not in left} - listed)
    # A link to a directory is not extra if files that are listed are in it.
    above = {path[: index.start()] for path in listed for index in re.finditer("/", path)}
    return [*problems, *(FileProblem(_printable(path), "extra") for path in extra if path not in above)]


def describe_problem(directory: Path, problem: FileProblem) -> str:
    """Return an error message for a file of a mirror that is missing or changed."""
    how = {"missing": "is missing", "unreadable": "cannot be read"}.get(problem.problem, "has changed")
    return (
        f"{_printable(problem.path)} in the mirror {directory} {how}. Copy the directory again, or run `emb-provider mirror` "
        f"again where the hub can be reached. `emb-provider verify {directory}` lists all differences."
    )


# --- writing ------------------------------------------------------------------------------------------


def write(snapshot: Snapshot, directory: Path, name: str, on_bytes: Callable[[int, int], None]) -> MirrorChanges:
    """Make a directory a mirror of a model. Files in it that are right are left alone, so that a second run resumes.

    Args:
        snapshot: The model, with everything that it needs.
        directory: An absolute path: a directory that does not exist or is empty, or a mirror of the same repository.
        name: The name under which the model is served.
        on_bytes: Called with the bytes that are checked or copied so far, and those of all files.

    Raises:
        NotAllowedError: The directory contains something else, or leads through a symbolic link.
        CorruptSnapshotError: A file of the snapshot has changed.
        HubError: The directory is not writable, or full.
    """
    target = _moved(snapshot, directory, name)
    sources = [part.path / file.path for part in parts_of(snapshot) for file in part.files]
    writer = _Writer(target, directory, name)
    try:
        writer.prepare()
        writer.copy(list(zip(sources, _relative_files(target), strict=True)), on_bytes)
        return writer.finish()
    except OSError as error:
        raise HubError(
            f"{snapshot.repository} could not be mirrored to {directory}: {error}. Free space or make it writable, and run "
            "the same command again, which continues; or choose another directory."
        ) from error


class _Writer:
    """Changes one directory. The manifest says that it is incomplete before anything in it is changed."""

    def __init__(self, target: Snapshot, directory: Path, name: str) -> None:
        self._target = target
        self._directory = directory
        self._name = name
        self._new = {file.path for file in _relative_files(target)}
        self._old: set[str] = set()
        """Files that earlier versions have written."""
        self._is_current = False
        """Whether the manifest in the directory is that of `target`."""
        self._is_marked = False
        self._copied: list[SnapshotFile] = []
        self._removed: list[str] = []

    def prepare(self) -> None:
        """Check the directory, and remove files of an earlier version that the new one does not have."""
        _check_names(self._target, self._new)
        self._directory.mkdir(parents=True, exist_ok=True)
        content = _read_content(self._directory)
        left = list_dir(self._directory, _TEMPORARY_MANIFESTS)
        if content is None:
            if others := [path.name for path in list_dir(self._directory) if path not in left]:
                raise NotAllowedError(
                    f"{self._directory} is not empty, and not a mirror ({others[0]}): nothing was changed. Choose a directory "
                    "that is empty or does not exist, such as a new one in it."
                )
        else:
            self._read_earlier(content)
        for path in left:
            path.unlink(missing_ok=True)
        for name in sorted(self._old - self._new):
            self._remove(name)

    def copy(self, sources: Collection[tuple[Path, SnapshotFile]], on_bytes: Callable[[int, int], None]) -> None:
        """Copy the files that are missing or differ."""
        done, total = 0, sum(file.size for _, file in sources)
        for source, file in sources:
            path = self._path(file.path)
            self._partial(path).unlink(missing_ok=True)
            if path.is_symlink() or not check_files(self._directory, [file]).ok:
                self._mark()
                path.parent.mkdir(parents=True, exist_ok=True)
                self._copy_file(source, path, file, partial(_report, on_bytes, done, total))
                self._copied.append(file)
            done += file.size
            on_bytes(done, total)

    def finish(self) -> MirrorChanges:
        """Write the manifest."""
        if self._is_marked or not self._is_current:
            created = datetime.now(UTC).isoformat(timespec="seconds")
            part = _part_to_json(self._target, self._directory)
            self._write({"complete": True, "name": self._name, "created": created, **part})
        return MirrorChanges(len(self._copied), sum(file.size for file in self._copied), tuple(self._removed))

    def _read_earlier(self, content: dict[str, Any]) -> None:
        target = self._target
        try:
            found = (content["hub"], content["repository"])
            if content["complete"] is True:
                earlier = _parse_mirror(content, self._directory)
                self._old = {file.path for file in earlier.files}
                self._is_current = (earlier.snapshot, earlier.name) == (target, self._name)
            else:
                self._old = {_safe(path) for path in content["written"]}
        except (ValueError, KeyError, TypeError) as error:
            raise NotAllowedError(
                f"{self._directory / MIRROR_MANIFEST} is invalid ({error}): nothing was changed. Choose another directory, or "
                "remove this one first."
            ) from error
        if found != (target.hub, target.repository):
            raise NotAllowedError(
                f"{self._directory} is a mirror of {found[1]} ({found[0]}), not of {target.repository} ({target.hub}): "
                "nothing was changed. Choose another directory, or remove this one first."
            )

    def _mark(self) -> None:
        """Record that the mirror is incomplete, and which files in it can be removed."""
        if not self._is_marked:
            target = self._target
            origin = {"hub": target.hub, "repository": target.repository, "revision": target.revision}
            self._write({"complete": False, "name": self._name, **origin, "written": sorted(self._old | self._new)})
            self._is_marked = True

    def _write(self, content: dict[str, Any]) -> None:
        content = {"format": _FORMAT, "version": _VERSION, **content}
        write_atomically(self._directory / MIRROR_MANIFEST, json.dumps(content, indent=1).encode())

    def _remove(self, name: str) -> None:
        path = self._path(name)
        self._mark()
        self._partial(path).unlink(missing_ok=True)
        if path.is_symlink() or path.is_file():
            path.unlink()
            self._removed.append(name)
        if path.parent != self._directory:
            remove_empty_parents(path.parent, self._directory)

    def _path(self, name: str) -> Path:
        """Return the path of a file, after checking that no link leads outside the directory."""
        path = self._directory / name
        for parent in path.parents:
            if parent == self._directory:
                return path
            if parent.is_symlink():
                raise NotAllowedError(
                    f"{parent} is a symbolic link, and {name} would be written outside the mirror. Remove the link."
                )
        raise AssertionError("paths in a mirror are relative")

    def _partial(self, path: Path) -> Path:
        return path.with_name(_PARTIAL.format(path.name))

    def _copy_file(self, source: Path, path: Path, file: SnapshotFile, on_bytes: Callable[[int], None]) -> None:
        temporary = self._partial(path)
        hashed, size = hashlib.sha256(), 0
        try:
            # Fails if the file exists, even as a link, whose target would be overwritten.
            with source.open("rb") as original, temporary.open("xb") as copy:
                while block := original.read(_BLOCK_SIZE):
                    size += len(block)
                    hashed.update(block)
                    copy.write(block)
                    on_bytes(min(size, file.size))
                copy.flush()
                os.fsync(copy.fileno())  # because the manifest must not be on disk before the files that it lists
            if (size, hashed.hexdigest()) != (file.size, file.sha256):
                raise CorruptSnapshotError(
                    f"{source} of {self._target.repository} has changed since it was verified. To download it again: "
                    f"`emb-provider pull --force {self._name}`."
                )
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _report(on_bytes: Callable[[int, int], None], before: int, total: int, count: int) -> None:
    on_bytes(before + count, total)


def _check_names(target: Snapshot, names: Collection[str]) -> None:
    for name in names:
        if not is_safe_path(name):
            raise CorruptSnapshotError(
                f"{target.repository} has a file named {name!r}, which would be outside the mirror: nothing was copied."
            )
    for part in parts_of(target):
        for file in part.files:
            if file.path == MIRROR_MANIFEST or file.path.startswith(f"{DEPENDENCIES}/"):
                raise NotAllowedError(
                    f"{part.repository} has a file named {file.path}, a name that mirrors use themselves: nothing was "
                    f"copied. To leave it out: `emb-provider pull {target.repository} --exclude '{file.path}' --to DIR`."
                )


# --- the manifest -------------------------------------------------------------------------------------


def _moved(part: Snapshot, path: Path, name: str) -> Snapshot:
    """Return a snapshot as it is in a mirror. A directory loses its path, which means nothing on another machine."""
    dependencies = {
        each.required_as: _moved(each, path / DEPENDENCIES / _directory_name(each.required_as), each.path.name)
        for each in part.dependencies
    }
    is_directory = part.hub == "local" and not part.is_mirror
    moved = replace(part, path=path, repository=name if is_directory else part.repository, is_mirror=True)
    return moved.with_dependencies(dependencies)


def _directory_name(name: str) -> str:
    """Return the name of the directory of a dependency. Adapters of a local directory can name a base model by its path."""
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name, re.ASCII) and ".." not in name:
        return name.replace("/", "--")
    return hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:16]


def _relative_files(snapshot: Snapshot) -> list[SnapshotFile]:
    """Return all files of a mirror, those of the dependencies included, relative to its directory."""
    return [
        replace(file, path=(part.path / file.path).relative_to(snapshot.path).as_posix())
        for part in parts_of(snapshot)
        for file in part.files
    ]


def _part_to_json(part: Snapshot, directory: Path) -> dict[str, Any]:
    return {
        "hub": part.hub,
        "repository": part.repository,
        "revision": part.revision,
        "digest": part.digest,
        "files": [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in part.files],
        "dependencies": [
            {
                "required_as": each.required_as,
                "directory": each.path.relative_to(directory).as_posix(),
                **_part_to_json(each, directory),
            }
            for each in part.dependencies
        ],
    }


def _parse_mirror(content: dict[str, Any], directory: Path) -> Mirror:
    """Parse the manifest of a complete mirror; raise ValueError, KeyError or TypeError if it is invalid."""
    snapshot = _parse_part(content, directory, directory)
    if not snapshot.files or snapshot.digest != content["digest"]:
        raise ValueError("its digest does not match its files")
    return Mirror(_text(content["name"]), snapshot, datetime.fromisoformat(content["created"]))


def _parse_part(content: Any, path: Path, directory: Path, *, depth: int = _MAX_DEPTH) -> Snapshot:
    if content["hub"] not in get_args(HubName) or not depth:
        raise ValueError("it has an unknown hub, or too many dependencies")
    files = [SnapshotFile(_safe(each["path"]), int(each["size"]), _text(each["sha256"])) for each in content["files"]]
    snapshot = Snapshot.of(content["hub"], _text(content["repository"]), _text(content["revision"]), path, files)
    dependencies = {
        _text(each["required_as"]): _parse_part(each, directory / _safe(each["directory"]), directory, depth=depth - 1)
        for each in content["dependencies"]
    }
    return replace(snapshot, is_mirror=True).with_dependencies(dependencies)


def _read_content(directory: Path) -> dict[str, Any] | None:
    try:
        content = json.loads((directory / MIRROR_MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        raise _invalid(directory, error) from error
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (_FORMAT, _VERSION):
        raise _invalid(directory, "its format is unknown: update emb-model-provider")
    return content


def _invalid(directory: Path, reason: object) -> CorruptSnapshotError:
    return CorruptSnapshotError(
        f"The manifest {directory / MIRROR_MANIFEST} is invalid ({reason}). Copy the directory again. To use the directory "
        f"without verification, remove {MIRROR_MANIFEST}."
    )


def _safe(path: Any) -> str:
    if not isinstance(path, str) or not is_safe_path(path):
        raise ValueError(f"it names {path!r}")
    return path


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def _printable(path: str) -> str:
    return path.encode(errors="surrogateescape").decode(errors="backslashreplace")
