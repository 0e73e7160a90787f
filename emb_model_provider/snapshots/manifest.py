"""Manifests: records on disk that a snapshot is complete.

There is one JSON file for each request that was sent to a hub, below `<cache directory>/snapshots/`:

    {hub}/{readable repository}--{digest}.json      its time stamp is when the snapshot was last used
    {hub}/{readable repository}--{digest}.pending   the journal of a download or a removal (journal.py)
    {hub}/{readable repository}--{digest}.lock      held while something of that repository is downloaded or removed

`digest` is the start of sha256 over hub, repository and the *requested* revision, because branches move. The endpoint is only
recorded: a mirror has the same models. The file is written last and atomically; a snapshot without a valid manifest does
not exist.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from emb_model_provider.model_spec import HubName
from emb_model_provider.snapshots.files import MUST_HASH, check_files, list_dir, write_atomically
from emb_model_provider.snapshots.snapshot import Snapshot, SnapshotFile, digest_of, is_safe_path
from emb_model_provider.snapshots.weights import is_variant, split_path

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping

logger = logging.getLogger(__name__)

_VERSION = 1
_SELECTION = 2
"""The version of the rules by which the files of a snapshot were selected. By the first ones, `model.fp16.safetensors` took
the place of `pytorch_model.bin`, which the libraries read."""


@dataclass(frozen=True, slots=True)
class FilePatterns:
    """Patterns (fnmatch) of the files to download, among those that serving needs. Empty: all of them."""

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.include or self.exclude)

    def match(self, path: str) -> bool:
        is_included = not self.include or any(fnmatchcase(path, pattern) for pattern in self.include)
        return is_included and not any(fnmatchcase(path, pattern) for pattern in self.exclude)


ALL_FILES = FilePatterns()


@dataclass(frozen=True, slots=True)
class ManifestKey:
    """A request to a hub, which identifies a manifest."""

    hub: HubName
    repository: str
    revision: str | None = None
    """As requested; None is the default branch."""
    endpoint: str | None = field(default=None, compare=False)
    """Where it was downloaded from, if not from the default endpoint."""
    patterns: FilePatterns = ALL_FILES

    @property
    def stem(self) -> str:
        """A file name that is readable and unique."""
        # The empty text is in the place of the endpoint, which earlier versions included.
        values: list[Any] = [self.hub, "", self.repository, self.revision]
        if self.patterns:
            values += [self.patterns.include, self.patterns.exclude]
        return _file_name(self.repository, values)

    def as_json(self) -> dict[str, Any]:
        content: dict[str, Any] = {
            "hub": self.hub,
            "endpoint": self.endpoint,
            "repository": self.repository,
            "asked_revision": self.revision,
        }
        if self.patterns:
            content |= {"include": list(self.patterns.include), "exclude": list(self.patterns.exclude)}
        return content

    @classmethod
    def from_json(cls, content: Any) -> ManifestKey:
        """Read what `as_json` returned; raise ValueError, KeyError or TypeError if it is something else."""
        hub, repository = content["hub"], content["repository"]
        endpoint, revision = content["endpoint"], content["asked_revision"]
        include, exclude = content.get("include", []), content.get("exclude", [])
        texts = [repository, *include, *exclude, *(text for text in (endpoint, revision) if text is not None)]
        if hub not in get_args(HubName) or not all(isinstance(text, str) for text in texts):
            raise ValueError("it has an invalid key")
        if hub in ("huggingface", "modelscope") and (".." in repository or repository.startswith("/")):
            raise ValueError("its repository would lead outside a cache")
        return cls(hub, repository, revision, endpoint, FilePatterns(tuple(include), tuple(exclude)))

    def manifest_path(self, manifest_dir: Path) -> Path:
        return manifest_dir / self.hub / f"{self.stem}.json"

    def journal_path(self, manifest_dir: Path) -> Path:
        return manifest_dir / self.hub / f"{self.stem}.pending"

    def lock_path(self, manifest_dir: Path) -> Path:
        """The lock of all requests for one repository, because they share files in the client's cache."""
        name = _file_name(self.repository, [self.hub, self.repository])
        return manifest_dir / self.hub / f"{name}.lock"


@dataclass(frozen=True, slots=True)
class Manifest:
    """A snapshot, and what was recorded when its files were hashed."""

    snapshot: Snapshot
    mtimes: dict[str, int]
    """Time stamps of the files, in nanoseconds."""
    fetched: float | None
    """Unix time in seconds; None if an older version did not record it."""
    dependencies: Mapping[str, ManifestKey] = field(default_factory=dict)
    """Of a model that needs other repositories: their names in its files, and the keys of their manifests."""
    composed_digest: str | None = None
    """The digest of the snapshot with its dependencies, as it was last used; None if it has none."""

    selection: int = _SELECTION

    @property
    def is_outdated(self) -> bool:
        """Whether files that are needed may be missing, because an older version selected them."""
        return self.selection < _SELECTION and any(is_variant(split_path(file.path)[1]) for file in self.snapshot.files)

    @property
    def digests(self) -> set[str]:
        """The digests under which artifacts refer to this snapshot."""
        return {self.snapshot.digest, self.composed_digest or self.snapshot.digest}

    @property
    def is_invalidated(self) -> bool:
        """Whether a file was found to have wrong bytes at the right size."""
        return MUST_HASH in self.mtimes.values()


def save(
    key: ManifestKey,
    snapshot: Snapshot,
    manifest_dir: Path,
    *,
    mtimes: Mapping[str, int] | None = None,
    fetched: float | None = None,
) -> None:
    """Write the manifest of a snapshot whose files were just hashed.

    `mtimes` are the time stamps of the files before they were hashed, in nanoseconds. None: those that they have now, for
    files that nothing else changes. `fetched` is the Unix time of the download; None is now.
    """
    if mtimes is None:
        mtimes = {file.path: (snapshot.path / file.path).stat().st_mtime_ns for file in snapshot.files}
    content = {
        "version": _VERSION,
        **key.as_json(),
        "selection": _SELECTION,
        "fetched": time.time() if fetched is None else fetched,
        "revision": snapshot.revision,
        "path": str(snapshot.path),
        "digest": snapshot.digest,
        "files": [
            {"path": file.path, "size": file.size, "sha256": file.sha256, "mtime_ns": mtimes[file.path]}
            for file in snapshot.files
        ],
    }
    if snapshot.is_mirror:
        content["mirror_of"] = {"hub": snapshot.hub, "repository": snapshot.repository}
    write_atomically(key.manifest_path(manifest_dir), json.dumps(content, indent=1).encode())


def load(key: ManifestKey, manifest_dir: Path) -> Manifest | None:
    """Return a manifest, or None if there is none or it is invalid. Reads no other file."""
    found = _read(key.manifest_path(manifest_dir))
    return found[1] if found is not None and found[0] == key else None


def load_verified(
    key: ManifestKey, manifest_dir: Path, on_bytes: Callable[[int, int], None] = lambda _done, _total: None
) -> Snapshot | None:
    """Return the snapshot of a manifest if it is complete and its files are unchanged, else None (see `check_files`)."""
    found = load(key, manifest_dir)
    if found is None or found.is_outdated:
        return None
    snapshot = found.snapshot
    check = check_files(snapshot.path, snapshot.files, found.mtimes, on_bytes)
    if not check.ok:
        problem = check.problems[0]
        logger.warning(
            "The snapshot of %s in %s has changed: %s (%s)",
            key.repository, snapshot.path, problem.path, problem.problem,
        )  # fmt: skip
        return None
    # Another process may have replaced the manifest during the hashing.
    if check.hashed and load(key, manifest_dir) == found:
        try:
            save(key, snapshot, manifest_dir, mtimes={**found.mtimes, **check.hashed}, fetched=found.fetched)
        except OSError as error:
            logger.debug("Could not update the manifest of %s: %s", key.repository, error)
    return snapshot


def record_dependencies(
    key: ManifestKey, snapshot: Snapshot, dependencies: Mapping[str, ManifestKey], manifest_dir: Path
) -> None:
    """Record in the manifest of a model which manifests its dependencies have, if something else is recorded."""
    found = load(key, manifest_dir)
    composed_digest = snapshot.digest if dependencies else None
    if found is None or (found.dependencies == dependencies and found.composed_digest == composed_digest):
        return
    path = key.manifest_path(manifest_dir)
    content = json.loads(path.read_bytes())
    if content["digest"] != digest_of(snapshot.files):  # replaced meanwhile
        return
    content["dependencies"] = {name: each.as_json() for name, each in dependencies.items()}
    content["composed_digest"] = composed_digest
    write_atomically(path, json.dumps(content, indent=1).encode())


def compose(found: Manifest, manifest_dir: Path, *, depth: int = 2) -> Snapshot:
    """Return the snapshot of a manifest with those of its dependencies that have manifests, too. Reads no other file.

    `depth` ends the recursion: an adapter needs a base model, which can need code of another repository.
    """
    dependencies: dict[str, Snapshot] = {}
    for name, key in found.dependencies.items() if depth else ():
        if (each := load(key, manifest_dir)) is not None:
            dependencies[name] = compose(each, manifest_dir, depth=depth - 1)
    return found.snapshot.with_dependencies(dependencies)


def load_all(manifest_dir: Path) -> Iterator[tuple[ManifestKey, Manifest]]:
    """Yield all valid manifests. Reads no other file."""
    for path in (path for directory in list_dir(manifest_dir) for path in list_dir(directory, "*.json")):
        # A file under another name than that of its key would never be looked up.
        if (found := _read(path)) is not None and path == found[0].manifest_path(manifest_dir):
            yield found


def complete_directories(manifest_dir: Path) -> set[Path]:
    """Return the directories of all snapshots that have a manifest."""
    return {found.snapshot.path for _, found in load_all(manifest_dir)}


def mark_used(key: ManifestKey, manifest_dir: Path) -> None:
    """Record in the manifest's time stamp that its snapshot is used now."""
    with contextlib.suppress(OSError):
        os.utime(key.manifest_path(manifest_dir))


def invalidate(key: ManifestKey, found: Manifest, paths: Collection[str], manifest_dir: Path) -> None:
    """Record that files must be hashed again, and downloaded again if they are wrong, before the snapshot is used."""
    path = key.manifest_path(manifest_dir)
    content = json.loads(path.read_bytes())
    if content["digest"] != found.snapshot.digest:  # replaced meanwhile
        return
    for entry in content["files"]:
        if entry["path"] in paths:
            entry["mtime_ns"] = MUST_HASH
    write_atomically(path, json.dumps(content, indent=1).encode())


def _read(path: Path) -> tuple[ManifestKey, Manifest] | None:
    try:
        return _parse(json.loads(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("The manifest %s is invalid and is ignored: %s", path, error)
        return None


def _parse(content: Any) -> tuple[ManifestKey, Manifest]:
    if content["version"] != _VERSION:
        raise ValueError(f"unknown version {content['version']}")
    key = ManifestKey.from_json(content)
    directory = Path(content["path"])
    files, mtimes = [], {}
    for entry in content["files"]:
        file = SnapshotFile(str(entry["path"]), int(entry["size"]), str(entry["sha256"]))
        if not is_safe_path(file.path):
            raise ValueError(f"it names {file.path!r}")
        files.append(file)
        mtimes[file.path] = int(entry["mtime_ns"])
    if not files or not directory.is_absolute() or digest_of(files) != content["digest"]:
        raise ValueError("its digest does not match its files")
    snapshot = Snapshot.of(key.hub, key.repository, str(content["revision"]), directory, files)
    if (origin := content.get("mirror_of")) is not None:
        if origin["hub"] not in get_args(HubName):
            raise ValueError(f"unknown hub {origin['hub']}")
        snapshot = replace(snapshot, hub=origin["hub"], repository=str(origin["repository"]), is_mirror=True)
    fetched = content.get("fetched")
    composed_digest = content.get("composed_digest")
    return key, Manifest(
        snapshot,
        mtimes,
        float(fetched) if isinstance(fetched, int | float) else None,
        {str(name): ManifestKey.from_json(each) for name, each in content.get("dependencies", {}).items()},
        str(composed_digest) if composed_digest is not None else None,
        int(content.get("selection", 1)),
    )


def _file_name(repository: str, values: Any) -> str:
    digest = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '--', repository)[-80:].strip('-')}--{digest}"
