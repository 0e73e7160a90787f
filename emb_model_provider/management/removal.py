"""Removes models from disk: everything that belongs to them, nothing that is in use, nothing of other programs.

A removal scans the disk to know which locks it needs, takes them, and scans again to plan what it removes, because a
download may have ended while it waited.
"""

from __future__ import annotations

import contextlib
import logging
import time
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from emb_model_provider.errors import ManagementError, ModelInUseError, NotAllowedError, NotCachedError
from emb_model_provider.hubs.caches import files_of, leftovers, remove_leftovers, repository_dirs
from emb_model_provider.management.types import KeptModel, Removal
from emb_model_provider.snapshots import journal
from emb_model_provider.snapshots.files import CACHE_SETTING, list_dir, size_of, translate_os_error, walk
from emb_model_provider.snapshots.locks import is_locked, try_lock_exclusive

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence
    from pathlib import Path

    from emb_model_provider.hubs.caches import SnapshotFiles
    from emb_model_provider.management.inventory import CacheEntry, CacheInfo, Inventory
    from emb_model_provider.snapshots.locks import FileLock

logger = logging.getLogger(__name__)

_STALE_FILE_S = 3600.0
"""Age of temporary files that a killed process has left, because writing one takes milliseconds."""


_Use = Literal["changing", "loaded", "served"]
"""How a process uses a model: it downloads or removes it, has loaded its files, or its compiled form."""


@dataclass(frozen=True, slots=True)
class RemovalPlan:
    """What removing models will remove."""

    entries: Sequence[CacheEntry]
    files: Sequence[SnapshotFiles | None]
    """For each entry its files in a client's cache, or None if it has none of ours."""
    artifacts: dict[str, int]
    """Key and size of the artifacts that no remaining model shares."""
    orphaned_digests: set[str]
    """Digests of snapshots that no remaining model has."""

    @property
    def freed(self) -> int:
        return (
            sum(self.artifacts.values())
            + sum(files.freed for files in self.files if files is not None)
            + sum(entry.leftover_size for entry in self.entries)
        )


class Remover:
    """Removes models that an inventory finds."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._manifest_dir = inventory.manifest_dir

    def remove(
        self,
        find: Callable[[CacheInfo], list[CacheEntry]],
        *,
        wait_s: float,
        dry_run: bool,
        released: Collection[Path | None] = (),
    ) -> Removal:
        """Remove all models that `find` returns for a scan, or none of them. See `ModelManager.remove`."""
        info = self._inventory.scan()
        entries = find(info)
        if dry_run:
            for entry in entries:
                self._require_unused(entry, released)
            return self._removal(self._plan(entries, info))
        with _LockSet(self._inventory, wait_s) as locks:
            while locks.add(entries, info):
                info = self._inventory.scan()
                entries = find(info)
            plan = self._plan(entries, info)
            self._execute(plan)
        return self._removal(plan)

    def remove_all(self, *, wait_s: float, dry_run: bool, released: Collection[Path | None] = ()) -> Removal:
        """Remove everything that this package put into the configured caches.

        What is in use, or in another directory, is kept, with the reason.
        """
        info = self._inventory.scan()
        if dry_run:
            return self._would_remove_all(info, released)
        deadline = time.monotonic() + wait_s
        total = Removal(models=[], artifacts=[], freed=0, kept=[])
        for entry in info.entries:
            if (elsewhere := self._elsewhere(entry)) is not None:
                total.kept.append(self._kept(entry, elsewhere))
                continue
            self._remove_or_keep(total, entry, wait_s=max(0.0, deadline - time.monotonic()), dry_run=False)
        _add(total, self.prune(dry_run=False))
        total.artifacts = list(dict.fromkeys(total.artifacts))
        return total

    def prune(self, *, dry_run: bool) -> Removal:
        """Remove leftovers: interrupted downloads and removals, and artifacts whose snapshot no longer exists."""
        info = self._inventory.scan()
        total = Removal(models=[], artifacts=[], freed=0, kept=[])
        for entry in info.entries:
            if entry.state == "incomplete":
                self._remove_or_keep(total, entry, wait_s=0.0, dry_run=dry_run, incomplete=True)
            else:
                total.freed += self._remove_beside(entry, info, dry_run=dry_run)
        with _translated_errors(self._inventory):
            artifacts, freed = self._remove_orphans(self._inventory.scan(), dry_run=dry_run)
        if not dry_run:
            self._remove_stale_files()
        total.artifacts += artifacts
        total.freed += freed
        return total

    def _remove_or_keep(
        self, total: Removal, entry: CacheEntry, *, wait_s: float, dry_run: bool, incomplete: bool = False
    ) -> None:
        """Remove a model, and add it to `total`, with the reason if it is kept."""
        try:
            removed = self.remove(partial(_find_again, entry, incomplete=incomplete), wait_s=wait_s, dry_run=dry_run)
        except NotCachedError:  # another process has removed it meanwhile
            return
        except ManagementError as error:
            total.kept.append(self._kept(entry, error))
        else:
            _add(total, removed)

    # --- planning -------------------------------------------------------------------------------------

    def _plan(self, entries: Sequence[CacheEntry], info: CacheInfo) -> RemovalPlan:
        files: list[SnapshotFiles | None] = []
        for entry in entries:
            files.append(self._files(entry, [each.path for each in files if each is not None]))
        orphaned = _orphaned_digests(entries, info)
        artifacts = {
            artifact.key: artifact.size
            for entry in entries
            for artifact in entry.artifacts
            if artifact.snapshot in orphaned
        }
        return RemovalPlan(entries, files, artifacts, orphaned)

    def _files(self, entry: CacheEntry, removed_before: Sequence[Path] = ()) -> SnapshotFiles | None:
        """Return the files to remove, or None if there are none of ours."""
        if not entry.owns_files or entry.path is None:
            return None
        if not entry.manifests:
            # Of an interrupted download only its own files are removed. After an interrupted removal another program may
            # have downloaded the snapshot again.
            removals = [each for each in entry.journals if each.operation == "remove"]
            if not removals or any(each.changed_by_others(entry.path) for each in removals):
                return None
        return files_of(entry.hub, entry.name, entry.path, self._inventory.roots[entry.hub], removed_before)

    def _elsewhere(self, entry: CacheEntry) -> NotAllowedError | None:
        """Return why a model that was downloaded to a directory of earlier settings is only removed by its name."""
        if not entry.owns_files or self._inventory.is_below_root(entry):
            return None
        return NotAllowedError(
            f"{entry.path} is not in a cache directory of the settings. To remove it, name it: `emb-provider rm {entry.name}`."
        )

    def _require_unused(self, entry: CacheEntry, released: Collection[Path | None]) -> None:
        if not entry.in_use or entry.path in released:
            return
        is_changing = any(is_locked(key.lock_path(self._manifest_dir)) for key in entry.keys)
        raise _in_use(entry, "changing" if is_changing else "loaded")

    def _would_remove_all(self, info: CacheInfo, released: Collection[Path | None]) -> Removal:
        removed: list[CacheEntry] = []
        kept: list[KeptModel] = []
        for entry in info.entries:
            try:
                if (elsewhere := self._elsewhere(entry)) is not None:
                    raise elsewhere
                self._require_unused(entry, released)
                self._files(entry)
            except ManagementError as error:
                kept.append(self._kept(entry, error))
            else:
                removed.append(entry)
        result = self._removal(self._plan(removed, info))
        orphans, freed = self._remove_orphans(info, dry_run=True)
        result.artifacts += orphans
        result.freed += freed
        result.kept = kept
        return result

    def _removal(self, plan: RemovalPlan) -> Removal:
        return Removal(
            models=[self._inventory.record_of(replace(entry, in_use=False)) for entry in plan.entries],
            artifacts=list(plan.artifacts),
            freed=plan.freed,
            kept=[],
        )

    def _kept(self, entry: CacheEntry, error: ManagementError) -> KeptModel:
        return KeptModel(**dict(self._inventory.record_of(entry)), reason=error.message)

    # --- executing ------------------------------------------------------------------------------------

    def _execute(self, plan: RemovalPlan) -> None:
        with _translated_errors(self._inventory):
            for entry, files in zip(plan.entries, plan.files, strict=True):
                self._remove_one(entry, files, plan.artifacts)
                logger.info("Removed %s (%s)", entry.name, entry.path)
            for path in self._inventory.store.records_of(plan.orphaned_digests):
                path.unlink(missing_ok=True)

    def _remove_one(self, entry: CacheEntry, files: SnapshotFiles | None, artifacts: Collection[str]) -> None:
        written = None
        if files is not None:
            key = entry.keys[0]
            locations = [(files.root, path) for path in repository_dirs(key.hub, key.repository, files.root)]
            written = journal.begin(key, "remove", locations, self._manifest_dir, path=files.path)
        # Without manifests the snapshot does not exist for any process, even if the removal is interrupted now.
        for key, _ in entry.manifests:
            key.manifest_path(self._manifest_dir).unlink(missing_ok=True)
        for artifact in entry.artifacts:
            if artifact.key in artifacts:
                self._inventory.store.remove(artifact.key)
        if files is not None:
            files.remove()
        for each in entry.journals:
            remove_leftovers(each, self._manifest_dir)
        if written is not None:
            written.delete(self._manifest_dir)

    def _remove_beside(self, entry: CacheEntry, info: CacheInfo, *, dry_run: bool) -> int:
        """Remove what an interrupted download has left next to a complete snapshot; return the freed bytes."""
        freed = 0
        for each in entry.journals:
            path = each.key.lock_path(self._manifest_dir)
            if dry_run:
                freed += 0 if is_locked(path) else leftovers(each, info.directories).size
                continue
            with contextlib.suppress(OSError):
                if (lock := try_lock_exclusive(path)) is not None:
                    with lock:
                        # Read again, because another download can have begun and failed since the scan.
                        present = journal.load(each.key.journal_path(self._manifest_dir))
                        freed += remove_leftovers(present, self._manifest_dir) if present is not None else 0
        return freed

    def _remove_orphans(self, info: CacheInfo, *, dry_run: bool) -> tuple[list[str], int]:
        """Remove artifacts and records whose snapshot no longer exists; return their keys, and the freed bytes."""
        store = self._inventory.store
        digests = info.digests
        freed = sum(size_of(walk(path)) for path in store.unfinished())
        removed: list[str] = []
        for artifact in info.artifacts:
            if artifact.snapshot in digests:
                continue
            if dry_run:
                is_removed = not store.is_held(artifact.key)
            else:
                with store.try_lock(artifact.key) or contextlib.nullcontext() as lock:
                    is_removed = lock is not None and store.remove(artifact.key)
            if is_removed:
                removed.append(artifact.key)
                freed += artifact.size
        if not dry_run:
            store.remove_unfinished()
            for path in store.records_of(digests, others=True):
                path.unlink(missing_ok=True)
        return removed, freed

    def _remove_stale_files(self) -> None:
        for directory in list_dir(self._manifest_dir):
            for path in list_dir(directory, ".*.tmp"):
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > _STALE_FILE_S:
                        path.unlink()


class _LockSet(ExitStack):
    """The exclusive locks of a removal."""

    def __init__(self, inventory: Inventory, wait_s: float) -> None:
        super().__init__()
        self._inventory = inventory
        self._deadline = time.monotonic() + wait_s
        self._locked: set[object] = set()

    def add(self, entries: Sequence[CacheEntry], info: CacheInfo) -> bool:
        """Lock everything that removing models changes; return whether something was not locked before."""
        inventory = self._inventory
        before = len(self._locked)
        orphaned = _orphaned_digests(entries, info)
        for entry in entries:
            for path in sorted({key.lock_path(inventory.manifest_dir) for key in entry.keys}):
                lock = partial(try_lock_exclusive, path)
                self._add(entry, path, lock, "changing")
            if entry.path is not None:
                lock = partial(inventory.locks.try_lock, entry.path)
                self._add(entry, entry.path, lock, "loaded")
            for artifact in entry.artifacts:
                if artifact.snapshot in orphaned:
                    lock = partial(inventory.store.try_lock, artifact.key)
                    self._add(entry, artifact.key, lock, "served")
        return len(self._locked) > before

    def _add(self, entry: CacheEntry, resource: object, lock: Callable[..., FileLock | None], use: _Use) -> None:
        if resource in self._locked:
            return
        with _translated_errors(self._inventory):
            held = lock(wait_s=max(0.0, self._deadline - time.monotonic()))
        if held is None:
            raise _in_use(entry, use)
        self.enter_context(held)
        self._locked.add(resource)


def _find_again(entry: CacheEntry, info: CacheInfo, *, incomplete: bool = False) -> list[CacheEntry]:
    """Find a model of an earlier scan; with `incomplete`, only if it is still incomplete."""
    same = [each for each in info.entries if each.is_same(entry)]
    entries = [each for each in same if each.state == "incomplete" or not incomplete]
    if not entries:
        raise NotCachedError(f"{entry.name} is no longer on this machine.")
    return entries


def _orphaned_digests(removed: Sequence[CacheEntry], info: CacheInfo) -> set[str]:
    """Return the digests of the snapshots that no model has when some models are removed."""
    locations = {entry.location for entry in removed}
    remaining = {digest for entry in info.entries if entry.location not in locations for digest in entry.digests}
    return {digest for entry in removed for digest in entry.digests} - remaining


def _add(total: Removal, removed: Removal) -> None:
    total.models += removed.models
    total.artifacts += removed.artifacts
    total.freed += removed.freed
    total.kept += removed.kept


def _in_use(entry: CacheEntry, use: _Use) -> ModelInUseError:
    if use == "changing":
        return ModelInUseError(
            f"{entry.name} is in use: it is being downloaded or removed. Nothing was removed. Wait until that has ended "
            "(`--wait SECONDS`), or cancel the download first."
        )
    how = "has loaded it, or is loading it" if use == "loaded" else "serves its compiled form"
    return ModelInUseError(
        f"{entry.name} is in use: a process {how}. Nothing was removed. To let the running server unload it first: "
        f"`emb-provider rm --unload {entry.name}`. If it is another process, end it, or wait for it (`--wait SECONDS`)."
    )


@contextlib.contextmanager
def _translated_errors(inventory: Inventory) -> Iterator[None]:
    """Raise a ManagementError in place of an OSError."""
    try:
        yield
    except OSError as error:
        directory = inventory.manifest_dir.parent
        known = translate_os_error(error, directory, CACHE_SETTING)
        raise ManagementError(known.message if known else f"{directory} cannot be changed: {error}.") from error
