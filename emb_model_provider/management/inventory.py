"""A scan of the disk: manifests, journals and artifacts, put together as the models that they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from emb_model_provider.artifacts.store import ArtifactStore
from emb_model_provider.errors import NotCachedError
from emb_model_provider.hubs.caches import REMOTE_HUBS, cache_root, leftovers, scan_cache
from emb_model_provider.management.types import CachedArtifact, CachedModelRecord, FidelityObject, cache_id
from emb_model_provider.model_spec import HubName
from emb_model_provider.snapshots import journal, manifest
from emb_model_provider.snapshots.files import has_sizes, size_of, walk
from emb_model_provider.snapshots.locks import SnapshotLocks, is_locked

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from emb_model_provider.artifacts.manifest import ArtifactInfo
    from emb_model_provider.management.types import State
    from emb_model_provider.settings import Settings
    from emb_model_provider.snapshots.journal import Journal
    from emb_model_provider.snapshots.manifest import Manifest, ManifestKey


Location = tuple[HubName, str, Path | None]
"""Hub, name and directory of a model, which identify it on disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheEntry:
    """A model on disk: the files in one directory, and everything that is recorded about them."""

    hub: HubName
    name: str
    """The repository id on its hub, or a local directory."""
    endpoint: str | None
    asked_revision: str | None
    revision: str | None
    path: Path | None
    """The directory of the files; None if a download has not created it yet."""
    state: State
    files_size: int
    """Bytes, without artifacts."""
    leftover_size: int = 0
    """Bytes of what an interrupted download or removal has left, next to a snapshot that is being removed."""
    fetched: datetime | None
    last_used: datetime | None
    in_use: bool
    manifests: Sequence[tuple[ManifestKey, Manifest]] = ()
    """Every request that led to this directory, with its manifest."""
    journals: Sequence[Journal] = ()
    artifacts: Sequence[ArtifactInfo] = ()

    @property
    def id(self) -> str:
        """The name as one part of a path: `Qwen_Qwen3-0.6B` for `Qwen/Qwen3-0.6B`."""
        return cache_id(self.name)

    @property
    def keys(self) -> list[ManifestKey]:
        return [key for key, _ in self.manifests] + [each.key for each in self.journals]

    @property
    def digests(self) -> set[str]:
        """The digests of its snapshots, by which artifacts refer to it."""
        return {found.snapshot.digest for _, found in self.manifests}

    @property
    def owns_files(self) -> bool:
        """Whether removing the model removes its files: directories and the bundled model are not ours."""
        return self.hub in REMOTE_HUBS

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
        """Return the model that an earlier scan has found.

        Raises:
            NotCachedError: It is no longer on disk.
        """
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

    def roots(self, hub: HubName) -> tuple[Path, ...]:
        """Return the configured caches of a hub's client."""
        return self._roots.get(hub, ())

    @cached_property
    def _roots(self) -> dict[HubName, tuple[Path, ...]]:
        own = [spec.cache_dir for spec in self._models.specs() if spec.cache_dir is not None]
        return {
            hub: tuple(dict.fromkeys(cache_root(hub, directory) for directory in (self._hubs.hub_cache_dir(hub), *own)))
            for hub in REMOTE_HUBS
        }

    def scan(self, *, everything: bool = False) -> CacheInfo:
        """Read all manifests, journals and artifacts.

        Args:
            everything: Also look for models that other programs left in the hubs' caches.
        """
        artifacts = self.store.list()
        # Before the manifests, so that a download that ends now is found as one of the two.
        journals = self._journals()
        by_directory: dict[tuple[str, Path], list[tuple[ManifestKey, Manifest]]] = {}
        for key, found in manifest.load_all(self.manifest_dir):
            by_directory.setdefault((key.hub, found.snapshot.path), []).append((key, found))
        entries = [self._downloaded(found, journals, artifacts) for found in by_directory.values()]
        with_snapshot = [each for entry in entries for each in entry.journals]
        complete = {path for _, path in by_directory}
        entries += [self._interrupted(each, complete) for each in journals if each not in with_snapshot]
        if everything:
            known = {entry.path for entry in entries}
            entries += [entry for entry in self._unverified() if entry.path not in known]
        entries.sort(key=lambda entry: (entry.name.lower(), entry.hub, entry.asked_revision or ""))
        return CacheInfo(tuple(entries), tuple(artifacts))

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
        self, found: list[tuple[ManifestKey, Manifest]], journals: Sequence[Journal], artifacts: Sequence[ArtifactInfo]
    ) -> CacheEntry:
        # Several requests can lead to one directory: show the one for the default branch without file patterns.
        found.sort(key=lambda each: (each[0].has_patterns, each[0].revision or ""))
        key, first = found[0]
        snapshot = first.snapshot
        files = {file.path: file for _, each in found for file in each.snapshot.files}
        digests = {each.snapshot.digest for _, each in found}
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
            in_use=self._in_use(key, snapshot.path) or any(self.store.is_held(each.key) for each in own),
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
            revision=None,
            path=path,
            state="incomplete",
            files_size=left.size + (size_of(walk(found.path)) if found.path is not None else 0),
            leftover_size=left.size,
            fetched=None,
            last_used=_latest([found.touched]),
            in_use=self._in_use(found.key, path),
            journals=(found,),
        )

    def _journals(self) -> list[Journal]:
        """Return the journals of work in configured caches; other directories are not looked at."""
        return [
            each for each in journal.load_all(self.manifest_dir) if set(each.roots) <= set(self.roots(each.key.hub))
        ]

    def _unverified(self) -> Iterable[CacheEntry]:
        for hub in REMOTE_HUBS:
            for root in self.roots(hub):
                for found in scan_cache(hub, root):
                    yield CacheEntry(
                        hub=hub,
                        name=found.repository,
                        endpoint=None,
                        asked_revision=None,
                        revision=found.revision,
                        path=found.path,
                        state="unverified",
                        files_size=size_of(walk(found.path)),
                        fetched=None,
                        last_used=None,
                        in_use=False,
                    )

    def _in_use(self, key: ManifestKey, path: Path | None) -> bool:
        if is_locked(key.lock_path(self.manifest_dir)):
            return True
        return path is not None and self.locks.is_held(path)


def _mtime(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None


def _latest(times: Iterable[float | None]) -> datetime | None:
    known = [each for each in times if each is not None]
    return datetime.fromtimestamp(max(known), UTC) if known else None
