"""Manifests: what says, on disk, that a snapshot is complete.

One JSON file per question asked of a hub, under `HubConfig.manifest_dir`:

    {hub}/{repository, readable}--{key}.json

`key` is the start of sha256 over hub, endpoint, repository and the revision *asked for*, since the same
name can mean something else at another endpoint, and a branch moves. The file is written last and in one
step; a snapshot without a valid one does not exist.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emb_model_provider.hubs.snapshot import Snapshot, SnapshotFile, digest_of, hash_file, is_safe_path
from emb_model_provider.hubs.storage import write_atomically

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.hubs.base import HubName

log = logging.getLogger(__name__)

_VERSION = 1
_SECOND = 10**9


@dataclass(frozen=True, slots=True)
class Question:
    """What was asked of a hub: the identity of a manifest."""

    hub: HubName
    repository: str
    revision: str | None = None
    endpoint: str | None = None

    @property
    def stem(self) -> str:
        """A file name: readable, and never the same for two questions."""
        asked = json.dumps([self.hub, (self.endpoint or "").rstrip("/"), self.repository, self.revision])
        key = hashlib.sha256(asked.encode()).hexdigest()[:16]
        return f"{re.sub(r'[^A-Za-z0-9._-]+', '--', self.repository)[-80:].strip('-')}--{key}"

    def manifest_path(self, manifest_dir: Path) -> Path:
        return manifest_dir / self.hub / f"{self.stem}.json"

    def lock_path(self, manifest_dir: Path) -> Path:
        return manifest_dir / self.hub / f"{self.stem}.lock"


@dataclass(frozen=True, slots=True)
class Manifest:
    """A snapshot, and the time stamps its files had when they were hashed (nanoseconds)."""

    snapshot: Snapshot
    mtimes: dict[str, int]


def save(question: Question, snapshot: Snapshot, manifest_dir: Path) -> None:
    """Write the manifest of a snapshot whose files were just hashed.

    Raises: OSError.
    """
    content = {
        "version": _VERSION,
        "hub": question.hub,
        "endpoint": question.endpoint,
        "repository": question.repository,
        "asked_revision": question.revision,
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
            save(question, snapshot, manifest_dir)
        except OSError as error:
            log.debug("Could not renew the manifest of %s: %s", question.repository, error)
    return snapshot


def same_mtime(now: int, then: int) -> bool:
    """Whether two time stamps are the same, where a copy (a container's layer) kept only whole seconds."""
    return now == then or (now % _SECOND == 0 and now // _SECOND == then // _SECOND)


def _parse(question: Question, content: Any) -> Manifest:
    if content["version"] != _VERSION:
        raise ValueError(f"version {content['version']}")
    asked = [content[name] for name in ("hub", "endpoint", "repository", "asked_revision")]
    if asked != [question.hub, question.endpoint, question.repository, question.revision]:
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
    return Manifest(snapshot, mtimes)
