"""A scan of the disk: manifests, journals and artifacts, put together as the models that they belong to."""

from __future__ import annotations

import contextlib
import difflib
from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from emb_model_provider.artifacts.store import ArtifactStore
from emb_model_provider.errors import AmbiguousNameError, NotCachedError
from emb_model_provider.hubs.caches import REMOTE_HUBS, cache_root, leftovers, scan_cache
from emb_model_provider.management.types import CachedArtifact, CachedModelRecord, FidelityObject
from emb_model_provider.model_resolver import read_address
from emb_model_provider.model_spec import HubName
from emb_model_provider.snapshots import journal, manifest, mirror
from emb_model_provider.snapshots.files import has_sizes, size_of, walk
from emb_model_provider.snapshots.locks import SnapshotLocks, is_locked
from emb_model_provider.snapshots.manifest import Manifest, ManifestKey

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Sequence

    from emb_model_provider.artifacts.manifest import ArtifactInfo
    from emb_model_provider.hubs.caches import CachedRepo
    from emb_model_provider.management.types import State
    from emb_model_provider.model_spec import Source
    from emb_model_provider.settings import Settings
    from emb_model_provider.snapshots.journal import Journal
    from emb_model_provider.snapshots.mirror import Mirror

_MIN_COMMIT_CHARS = 7
"""Length from which the beginning of a commit refers to it."""

Location = tuple[HubName, str, Path | None]
"""Hub, name and directory of a model, which identify it on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEntry:
    """A model on disk: the files in one directory, and everything that is recorded about them."""

    hub: HubName
    name: str
    """The repository id on its hub, or a local directory."""
    endpoint: str | None = None
    asked_revision: str | None = None
    revision: str | None = None
    path: Path | None
    """The directory of the files; None if a download has not created it yet."""
    state: State
    files_size: int
    """Bytes, without artifacts."""
    leftover_size: int = 0
    """Bytes of what an interrupted download or removal has left, next to a snapshot that is being removed."""
    fetched: datetime | None = None
    last_used: datetime | None = None
    in_use: bool = False
    manifests: Sequence[tuple[ManifestKey, Manifest]] = ()
    """Every request that led to this directory, with its manifest."""
    journals: Sequence[Journal] = ()
    artifacts: Sequence[ArtifactInfo] = ()

    @property
    def id(self) -> str:
        """The name as one part of a path: `Qwen_Qwen3-0.6B` for `Qwen/Qwen3-0.6B`."""
        return self.name.strip("/").replace("/", "_")

    @property
    def keys(self) -> list[ManifestKey]:
        return [key for key, _ in self.manifests] + [each.key for each in self.journals]

    @property
    def digests(self) -> set[str]:
        """The digests of its snapshots, by which artifacts refer to it."""
        return _digests(self.manifests)

    @property
    def owns_files(self) -> bool:
        """Whether removing the model removes its files: directories and the bundled model are not ours."""
        return self.hub in REMOTE_HUBS

    @property
    def directory(self) -> Path | None:
        """The directory of the files if a user made it, so that it can be a mirror."""
        return self.path if self.hub == "local" else None

    @property
    def location(self) -> Location:
        return self.hub, self.name, self.path

    @property
    def size(self) -> int:
        """Bytes of its files and artifacts."""
        return self.files_size + sum(artifact.size for artifact in self.artifacts)

    def is_same(self, other: CacheEntry) -> bool:
        """Return whether it is the same model in the same place, possibly at a later stage of its download."""
        if self.location[:2] != other.location[:2]:
            return False
        return self.path == other.path or not set(self.keys).isdisjoint(other.keys)

    def is_from(self, source: Source | None, revision: str | None) -> bool:
        """Return whether it came from a hub, at a revision as it was requested or as it was resolved."""
        if source not in (None, "auto", self.hub):
            return False
        resolved = self.revision or ""
        is_commit = revision is not None and len(revision) >= _MIN_COMMIT_CHARS and resolved.startswith(revision)
        return is_commit or revision in (None, resolved, *(key.revision for key in self.keys))


@dataclass(frozen=True, slots=True)
class CacheInfo:
    """Everything that is on disk, as one scan has found it."""

    entries: Sequence[CacheEntry]
    """Models, sorted by name, hub and revision."""
    artifacts: Sequence[ArtifactInfo]

    @property
    def digests(self) -> set[str]:
        """The digests of all snapshots."""
        return {digest for entry in self.entries for digest in entry.digests}

    @property
    def directories(self) -> set[Path]:
        """The directories of all snapshots that have a manifest."""
        return {entry.path for entry in self.entries if entry.manifests and entry.path is not None}

    def entry_at(self, location: Location) -> CacheEntry:
        """Return the model that an earlier scan has found."""
        for entry in self.entries:
            if entry.location == location:
                return entry
        raise NotCachedError(f"{location[1]} is no longer on this machine (`emb-provider list`).")


class Inventory:
    """Scans the caches that the settings name. Changes nothing."""

    def __init__(self, settings: Settings) -> None:
        self._hubs = settings.hubs
        self._models = settings.models
        self.manifest_dir = self._hubs.cache_dir / "snapshots"
        self.store = ArtifactStore(self._hubs.cache_dir, max_bytes=self._hubs.max_artifact_bytes)
        self.locks = SnapshotLocks(self._hubs.cache_dir)

    @cached_property
    def roots(self) -> dict[HubName, tuple[Path, ...]]:
        """The configured caches of the hubs' clients."""
        own = [spec.cache_dir for spec in self._models.specs() if spec.cache_dir is not None]
        return {
            hub: tuple(dict.fromkeys(cache_root(hub, directory) for directory in (self._hubs.hub_cache_dir(hub), *own)))
            for hub in REMOTE_HUBS
        }

    def scan(self, *, everything: bool = False, directory: Path | None = None) -> CacheInfo:
        """Read all manifests, journals and artifacts.

        Args:
            everything: Include what other programs left in the caches.
            directory: A directory that is included even if it was never loaded, if it is a mirror.

        Raises:
            CorruptSnapshotError: `directory` is an incomplete mirror, or its manifest is invalid.
        """
        artifacts = self.store.list()
        # Before the manifests, so that a download that ends now is found as one of the two. A journal of work in
        # directories that are not configured is ignored.
        journals = [
            each
            for each in journal.load_all(self.manifest_dir)
            if set(each.roots) <= set(self.roots.get(each.key.hub, ()))
        ]
        by_directory: dict[tuple[HubName, Path], list[tuple[ManifestKey, Manifest]]] = {}
        for key, found in manifest.load_all(self.manifest_dir):
            by_directory.setdefault((key.hub, found.snapshot.path), []).append((key, found))
        if directory is not None and (mirrored := mirror.read(directory.absolute())) is not None:
            path = mirrored.snapshot.path
            by_directory["local", path] = [_of_mirror(mirrored, by_directory.get(("local", path), []))]
        owners = Counter(digest for found in by_directory.values() for digest in _digests(found))
        shared = {digest for digest, count in owners.items() if count > 1}
        entries = [self._downloaded(found, journals, artifacts, shared) for found in by_directory.values()]
        with_snapshot = [each for entry in entries for each in entry.journals]
        complete = {path for _, path in by_directory}
        entries += [self._interrupted(each, complete) for each in journals if each not in with_snapshot]
        if everything:
            entries += [
                CacheEntry(
                    hub=repo.hub,
                    name=repo.repository,
                    revision=repo.revision,
                    path=repo.path,
                    state="unverified",
                    files_size=size_of(walk(repo.path)),
                )
                for repo in self._unverified(entries)
            ]
        entries.sort(key=lambda entry: (entry.name.lower(), entry.hub, entry.asked_revision or ""))
        return CacheInfo(tuple(entries), tuple(artifacts))

    def is_below_root(self, entry: CacheEntry) -> bool:
        """Return whether the files of a model are in a configured cache of its hub."""
        roots = self.roots.get(entry.hub, ())
        return entry.path is None or any(entry.path.is_relative_to(root) for root in roots)

    def find(
        self, info: CacheInfo, name: str, source: Source | None, revision: str | None, *, removing: bool = False
    ) -> list[CacheEntry]:
        """Return the models of a scan that a name refers to. Without a source, an alias refers to that of the settings.

        Raises:
            NotCachedError: There is none. The message says how to download it, unless it is found for its removal.
        """
        name, source, revision = read_address(name, source, revision)
        requested, requested_revision = name, revision
        spec = next((each for each in self._models.specs() if name in each.aliases and name != each.name), None)
        if spec is not None:
            requested = str(spec.path) if spec.path is not None else spec.name
            requested_revision = revision or spec.revision
        by_name = self._by_name(requested, info.entries)
        found = [entry for entry in by_name if entry.is_from(source, requested_revision)]
        if spec is not None and source is None:
            found = [entry for entry in found if entry.hub == spec.source] or found
        if found:
            return found
        for repo in self._unverified(info.entries):
            if source in (None, "auto", repo.hub) and repo.repository == self._hubs.name_on(repo.hub, requested):
                raise NotCachedError(
                    f"{name} is in {repo.path}, but another program downloaded it: it is neither verified nor "
                    f"removed. `emb-provider pull {requested} --source {repo.hub}` verifies and adopts it without another "
                    "download."
                )
        raise NotCachedError(_not_cached(requested, source, revision, info.entries, offers_download=not removing))

    def record_of(self, entry: CacheEntry) -> CachedModelRecord:
        """Return an entry as it is shown to users."""
        return CachedModelRecord(
            id=entry.id,
            model_name=entry.name,
            source=entry.hub,
            asked_revision=entry.asked_revision,
            revision=entry.revision,
            path=str(entry.path) if entry.path is not None else None,
            state=entry.state,
            size=entry.size,
            files_size=entry.files_size,
            artifacts=[
                CachedArtifact(
                    key=artifact.key,
                    snapshot=artifact.snapshot,
                    precision=artifact.weights,
                    computed=artifact.computed,
                    size=artifact.size,
                    last_used=datetime.fromtimestamp(artifact.last_used, UTC),
                    fidelity=FidelityObject.of(artifact.fidelity),
                    in_use=self.store.is_held(artifact.key),
                )
                for artifact in entry.artifacts
            ],
            fetched=entry.fetched,
            last_used=entry.last_used,
            in_use=entry.in_use,
        )

    def _downloaded(
        self,
        found: list[tuple[ManifestKey, Manifest]],
        journals: Sequence[Journal],
        artifacts: Sequence[ArtifactInfo],
        shared: Collection[str],
    ) -> CacheEntry:
        # Several requests can lead to one directory: show the one for the default branch without file patterns.
        found.sort(key=lambda each: (bool(each[0].patterns), each[0].revision or ""))
        key, first = found[0]
        snapshot = first.snapshot
        files = {file.path: file for _, each in found for file in each.snapshot.files}
        digests = _digests(found)
        own = [artifact for artifact in artifacts if artifact.snapshot in digests]
        keys = {each for each, _ in found}
        is_damaged = any(each.is_invalidated for _, each in found) or not has_sizes(snapshot.path, files.values())
        return CacheEntry(
            hub=key.hub,
            name=key.repository,
            endpoint=key.endpoint,
            asked_revision=key.revision,
            revision=snapshot.revision,
            path=snapshot.path,
            state="damaged" if is_damaged else "complete",
            files_size=sum(file.size for file in files.values()),
            fetched=_latest(each.fetched for _, each in found),
            last_used=_latest(_mtime(each.manifest_path(self.manifest_dir)) for each in keys),
            # A compiled form that other models have, too, does not say which of them is loaded.
            in_use=self._in_use(key, snapshot.path)
            or any(self.store.is_held(each.key) for each in own if each.snapshot not in shared),
            manifests=tuple(found),
            # A removal that was interrupted before it removed all manifests has removed no files.
            journals=tuple(each for each in journals if each.key in keys or each.path == snapshot.path),
            artifacts=tuple(own),
        )

    def _interrupted(self, found: Journal, complete: Collection[Path]) -> CacheEntry:
        left = leftovers(found, complete)
        path = found.path or next(iter(left.snapshots), None)
        return CacheEntry(
            hub=found.key.hub,
            name=found.key.repository,
            endpoint=found.key.endpoint,
            asked_revision=found.key.revision,
            path=path,
            state="incomplete",
            files_size=left.size + (size_of(walk(found.path)) if found.path is not None else 0),
            leftover_size=left.size,
            last_used=_latest([found.touched]),
            in_use=self._in_use(found.key, path),
            journals=(found,),
        )

    def _unverified(self, known: Iterable[CacheEntry]) -> Iterator[CachedRepo]:
        """Yield what looks like a model in the clients' caches and is not known, because other programs left it there."""
        paths = {entry.path for entry in known}
        for hub, roots in self.roots.items():
            for root in roots:
                yield from (repo for repo in scan_cache(hub, root) if repo.path not in paths)

    def _in_use(self, key: ManifestKey, path: Path | None) -> bool:
        return is_locked(key.lock_path(self.manifest_dir)) or (path is not None and self.locks.is_held(path))

    def _by_name(self, name: str, entries: Sequence[CacheEntry]) -> Sequence[CacheEntry]:
        """Match the directory or the full name first, then the id, then the last part of the name."""
        with contextlib.suppress(OSError, RuntimeError):
            directory = str(Path(name).expanduser().absolute())
            if local := [entry for entry in entries if entry.hub == "local" and entry.name == directory]:
                return local
        if exact := [entry for entry in entries if entry.name in (name, self._hubs.name_on(entry.hub, name))]:
            return exact
        if by_id := [entry for entry in entries if entry.id == name]:
            if len(names := sorted({entry.name for entry in by_id})) > 1:
                raise AmbiguousNameError(
                    f"{name} can be any of {', '.join(names)}. Write the full name with its slash (over HTTP a slash "
                    "is %2F)."
                )
            return by_id
        last = [entry for entry in entries if entry.name.rstrip("/").rpartition("/")[2] == name]
        return last if len({entry.name for entry in last}) == 1 else []


def _digests(found: Iterable[tuple[ManifestKey, Manifest]]) -> set[str]:
    return {digest for _, each in found for digest in each.digests}


def _of_mirror(mirrored: Mirror, earlier: Sequence[tuple[ManifestKey, Manifest]]) -> tuple[ManifestKey, Manifest]:
    """Return the manifest of a mirror as it is now, which may have been replaced since it was last loaded."""
    snapshot = mirrored.snapshot
    plain = snapshot.with_dependencies({})
    fetched = mirrored.created.timestamp()
    key = earlier[0][0] if earlier else ManifestKey("local", str(snapshot.path))
    for _, found in earlier:
        if found.snapshot.digest == plain.digest:
            return key, replace(found, snapshot=plain, mtimes={}, fetched=fetched)
    return key, Manifest(plain, {}, fetched, composed_digest=snapshot.digest)


def _not_cached(
    name: str, source: Source | None, revision: str | None, entries: Sequence[CacheEntry], *, offers_download: bool
) -> str:
    what = f"{name}{f'@{revision}' if revision else ''}{f' from {source}' if source else ''}"
    # An id, such as Qwen_Qwen3-0.6B, is only the name of a model on disk. The owner of a repository comes first.
    repository = name.replace("_", "/", 1) if "/" not in name and "_" in name else name
    options = f"{f'@{revision}' if revision else ''}{f' --source {source}' if source else ''}"
    pull = f" To download it: `emb-provider pull {repository}{options}`."
    if "/" not in repository:
        pull = f" To download it, name its owner, too: `emb-provider pull OWNER/{repository}{options}`."
    if not offers_download:
        pull = ""
    names = list(dict.fromkeys(entry.name for entry in entries))
    if not names:
        return f"{what} is not on this machine, and no other model is.{pull}"
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.3) or names[:5]
    more = "" if len(names) <= len(close) else f", and {len(names) - len(close)} more"
    return f"{what} is not on this machine. Available: {', '.join(close)}{more} (`emb-provider list`).{pull}"


def _mtime(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _latest(times: Iterable[float | None]) -> datetime | None:
    known = [each for each in times if each is not None]
    return datetime.fromtimestamp(max(known), UTC) if known else None
