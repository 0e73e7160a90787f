"""Manifests: what says, on disk, that a snapshot is complete.

One JSON file per question asked of a hub, under `HubConfig.manifest_dir`:

    {hub}/{repository, readable}--{key}.json      its time stamp says when the snapshot was last used
    {hub}/{repository, readable}--{key}.pending   a fetch or a removal that goes on, or was killed (pending.py)
    {hub}/{repository, readable}--{key}.lock      held by who fetches or removes something of that repository

`key` is the start of sha256 over hub, endpoint, repository and the revision *asked for*, since the same
name can mean something else at another endpoint, and a branch moves. The file is written last and in one
step; a snapshot without a valid one does not exist.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from emb_model_provider.model_spec import HubName
from emb_model_provider.snapshots.files import listed, write_atomically
from emb_model_provider.snapshots.snapshot import Snapshot, SnapshotFile, digest_of, hash_file, is_safe_path

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator


log = logging.getLogger(__name__)

_VERSION = 1
_SECOND = 10**9
_NEVER = -1
"""A time stamp that no file has: of one that is to be hashed before it is used again."""


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked of a hub: the identity of a manifest."""

    hub: HubName
    repository: str
    revision: str | None = None
    endpoint: str | None = None
    include: tuple[str, ...] = ()
    """Patterns of the files that were asked for; none is all that serving needs."""
    exclude: tuple[str, ...] = ()

    @property
    def stem(self) -> str:
        """A file name: readable, and never the same for two questions."""
        asked: list[Any] = [self.hub, (self.endpoint or "").rstrip("/"), self.repository, self.revision]
        if self.include or self.exclude:
            asked += [self.include, self.exclude]
        return _file_name(self.repository, asked)

    def as_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {
            "hub": self.hub,
            "endpoint": self.endpoint,
            "repository": self.repository,
            "asked_revision": self.revision,
        }
        if self.include or self.exclude:
            content |= {"include": list(self.include), "exclude": list(self.exclude)}
        return content

    @classmethod
    def read(cls, content: Any) -> Question:
        """Read what `as_json` wrote. Raises: ValueError, KeyError or TypeError where it is something else."""
        hub, repository = content["hub"], content["repository"]
        endpoint, revision = content["endpoint"], content["asked_revision"]
        include, exclude = content.get("include", []), content.get("exclude", [])
        texts = [repository, *(endpoint,) * (endpoint is not None), *(revision,) * (revision is not None)]
        if hub not in get_args(HubName) or not all(
            isinstance(text, str) for text in [*texts, *include, *exclude]
        ):
            raise ValueError("it is not a question")
        if hub in ("huggingface", "modelscope") and (".." in repository or repository.startswith("/")):
            raise ValueError("it names a repository that would lead out of a cache")
        return cls(hub, repository, revision, endpoint, tuple(include), tuple(exclude))

    def manifest_path(self, manifest_dir: Path) -> Path:
        return manifest_dir / self.hub / f"{self.stem}.json"

    def lock_path(self, manifest_dir: Path) -> Path:
        """The lock of all questions about one repository: they share files in the client's cache."""
        name = _file_name(self.repository, [self.hub, self.repository])
        return manifest_dir / self.hub / f"{name}.lock"


@dataclass(frozen=True, slots=True)
class Manifest:
    """A snapshot, and the time stamps its files had when they were hashed (nanoseconds)."""

    snapshot: Snapshot
    mtimes: dict[str, int]
    fetched: float | None
    """Unix time, seconds; None where a manifest from before this was written down does not say."""

    @property
    def distrusted(self) -> bool:
        """Whether a file was found to have other bytes, at the right size."""
        return _NEVER in self.mtimes.values()


def save(question: Question, snapshot: Snapshot, manifest_dir: Path, *, fetched: float | None = None) -> None:
    """Write the manifest of a snapshot whose files were just hashed; `fetched` is now where it is not given.

    Raises: OSError.
    """
    content = {
        "version": _VERSION,
        **question.as_json(),
        "fetched": time.time() if fetched is None else fetched,
        "revision": snapshot.revision,
        "path": str(snapshot.path),
        "digest": snapshot.digest,
        "files": [
            {
                "path": file.path,
                "size": file.size,
                "sha256": file.sha256,
                "mtime_ns": (snapshot.path / file.path).stat().st_mtime_ns,
            }
            for file in snapshot.files
        ],
    }
    write_atomically(question.manifest_path(manifest_dir), json.dumps(content, indent=1).encode())


def load(question: Question, manifest_dir: Path) -> Manifest | None:
    """Read a manifest; None where there is none, or where it is not whole. Looks at no other file."""
    path = question.manifest_path(manifest_dir)
    try:
        return _parse(question, json.loads(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("The manifest %s is not valid and will not be used: %s", path, error)
        return None


def load_verified(
    question: Question, manifest_dir: Path, on_bytes: Callable[[int, int], None] | None = None
) -> Snapshot | None:
    """The snapshot that a manifest speaks for, if its files are still the same; else None.

    A file of the same size and time stamp is taken to be the same. One with another time stamp is hashed
    again; `on_bytes` is told how many bytes of how many were.
    """
    manifest = load(question, manifest_dir)
    if manifest is None:
        return None
    snapshot = manifest.snapshot
    touched: list[SnapshotFile] = []
    try:
        for file in snapshot.files:
            stat = (snapshot.path / file.path).stat()
            if stat.st_size != file.size:
                log.warning("%s has another size than its manifest says.", snapshot.path / file.path)
                return None
            if not same_mtime(stat.st_mtime_ns, manifest.mtimes[file.path]):
                touched.append(file)
        done, total = 0, sum(file.size for file in touched)
        for file in touched:
            if hash_file(snapshot.path / file.path).sha256 != file.sha256:
                log.warning("%s has other bytes than its manifest says.", snapshot.path / file.path)
                return None
            done += file.size
            if on_bytes is not None:
                on_bytes(done, total)
    except OSError as error:
        log.warning("The snapshot of %s is not complete: %s", question.repository, error)
        return None
    if touched:
        try:
            save(question, snapshot, manifest_dir, fetched=manifest.fetched)
        except OSError as error:
            log.debug("Could not renew the manifest of %s: %s", question.repository, error)
    return snapshot


def is_whole(snapshot: Snapshot) -> bool:
    """Whether all files of a snapshot are there, at their sizes. Reads none of them."""
    try:
        return all((snapshot.path / file.path).stat().st_size == file.size for file in snapshot.files)
    except OSError:
        return False


def manifest_files(manifest_dir: Path) -> Iterator[tuple[Question, Manifest]]:
    """All manifests that can be read, with what each answers. Looks at no other file."""
    for path in (path for directory in listed(manifest_dir) for path in listed(directory, "*.json")):
        try:
            question = Question.read(json.loads(path.read_bytes()))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("The manifest %s is not valid and will not be used: %s", path, error)
            continue
        # One under another name than its own question's would answer nothing.
        if (
            path == question.manifest_path(manifest_dir)
            and (found := load(question, manifest_dir)) is not None
        ):
            yield question, found


def mark_used(question: Question, manifest_dir: Path) -> None:
    """Let a manifest's time stamp say that its snapshot was used now."""
    with contextlib.suppress(OSError):
        os.utime(question.manifest_path(manifest_dir))


def distrust(question: Question, found: Manifest, paths: Collection[str], manifest_dir: Path) -> None:
    """Have files hashed again, and fetched again if they are not right, before the snapshot is used. Raises: OSError."""
    path = question.manifest_path(manifest_dir)
    content = json.loads(path.read_bytes())
    if content["digest"] != found.snapshot.digest:  # replaced meanwhile
        return
    for entry in content["files"]:
        if entry["path"] in paths:
            entry["mtime_ns"] = _NEVER
    write_atomically(path, json.dumps(content, indent=1).encode())


def same_mtime(now: int, then: int) -> bool:
    """Whether two time stamps are the same, where a copy (a container's layer) kept only whole seconds."""
    return now == then or (now % _SECOND == 0 and now // _SECOND == then // _SECOND)


def _parse(question: Question, content: Any) -> Manifest:
    if content["version"] != _VERSION:
        raise ValueError(f"version {content['version']}")
    if Question.read(content) != question:
        raise ValueError("it was written for something else")
    directory = Path(content["path"])
    files, mtimes = [], {}
    for entry in content["files"]:
        file = SnapshotFile(str(entry["path"]), int(entry["size"]), str(entry["sha256"]))
        if not is_safe_path(file.path):
            raise ValueError(f"it names {file.path!r}")
        files.append(file)
        mtimes[file.path] = int(entry["mtime_ns"])
    if not files or not directory.is_absolute() or digest_of(files) != content["digest"]:
        raise ValueError("its digest is not that of its files")
    snapshot = Snapshot.of(question.hub, question.repository, str(content["revision"]), directory, files)
    fetched = content.get("fetched")
    return Manifest(snapshot, mtimes, float(fetched) if isinstance(fetched, int | float) else None)


def _file_name(repository: str, key: Any) -> str:
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '--', repository)[-80:].strip('-')}--{digest}"
