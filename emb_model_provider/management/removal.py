"""Removing models from the disk: all that is theirs, nothing that is used, nothing that is somebody else's."""

from __future__ import annotations

import contextlib
import logging
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from emb_model_provider.errors import ManagementError, ModelInUseError, NotCachedError
from emb_model_provider.hubs.caches import files_of, places
from emb_model_provider.management.types import Removal
from emb_model_provider.snapshots import journal as markers
from emb_model_provider.snapshots.files import CACHE_SETTING, listed, size_of, storage_error
from emb_model_provider.snapshots.locks import claim, remove_stale

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

    from emb_model_provider.hubs.caches import SnapshotFiles
    from emb_model_provider.management.inventory import Inventory, Record
    from emb_model_provider.management.types import CachedSnapshot
    from emb_model_provider.snapshots.locks import Held


log = logging.getLogger(__name__)

_WRITING_S = 3600.0
"""From this age on a half-written file is what a killed process left: writing one takes milliseconds."""


class Remover:
    """Removes what an inventory finds."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory

    def remove(self, find: Callable[[], list[Record]], *, wait_s: float, dry_run: bool) -> Removal:
        """Remove what `find` finds, all or nothing.

        Raises: ModelInUseError when any is in use for longer than `wait_s` seconds; ManagementError.
        """
        records = find()
        if dry_run:
            for record in records:
                if record.entry.in_use:
                    raise in_use(record.entry, "a process uses it now")
            return self._remove_claimed(records, dry_run=True)
        try:
            return self._remove_alone(records, find, time.monotonic() + wait_s)
        finally:
            self._remove_empty_directories()

    def _remove_alone(
        self, records: Sequence[Record], find: Callable[[], list[Record]], deadline: float
    ) -> Removal:
        with ExitStack() as stack:
            claims = Claims(self._inventory, stack, deadline)
            claimed: set[tuple[str, str, Path | None]] = set()
            # What is there may change while there is something to wait for: a fetch comes to its end.
            while {record.place for record in records} - claimed:
                claims.take(records, self._digests_elsewhere(records))
                claimed |= {record.place for record in records}
                records = find()
            claims.take(records, self._digests_elsewhere(records))
            return self._remove_claimed(records, dry_run=False)

    def remove_all(self, *, wait_s: float, dry_run: bool) -> Removal:
        """Remove everything that this package put on the disk; what is in use is kept, with the reason."""
        if dry_run:
            return self._would_remove_all()
        deadline = time.monotonic() + wait_s
        snapshots: list[CachedSnapshot] = []
        artifacts: list[str] = []
        kept: list[tuple[CachedSnapshot, str]] = []
        freed = 0
        for record in self._inventory.records():
            try:
                one = self.remove(
                    self._finding(record), wait_s=max(0.0, deadline - time.monotonic()), dry_run=False
                )
            except NotCachedError:  # somebody else removed it meanwhile
                continue
            except ManagementError as error:
                kept.append((record.entry, error.message))
                continue
            snapshots += one.snapshots
            artifacts += one.artifacts
            freed += one.freed
        rest = self.prune(dry_run=False)
        artifacts = list(dict.fromkeys([*artifacts, *rest.artifacts]))
        return Removal(snapshots=snapshots, artifacts=artifacts, freed=freed + rest.freed, kept=kept)

    def _would_remove_all(self) -> Removal:
        """All at a time: what two of them share would go with the later one."""
        removed: list[Record] = []
        kept: list[tuple[CachedSnapshot, str]] = []
        for record in self._inventory.records():
            try:
                if record.entry.in_use:
                    raise in_use(record.entry, "a process uses it now")
                self._files(record)
            except ManagementError as error:
                kept.append((record.entry, error.message))
            else:
                removed.append(record)
        would = self._remove_claimed(removed, dry_run=True)
        orphans, more = self._remove_orphans(dry_run=True)
        return replace(would, artifacts=[*would.artifacts, *orphans], freed=would.freed + more, kept=kept)

    def prune(self, *, dry_run: bool) -> Removal:
        """Remove what nobody can use: what killed processes left, and what derives from snapshots that are gone."""
        snapshots: list[CachedSnapshot] = []
        kept: list[tuple[CachedSnapshot, str]] = []
        freed = 0
        for record in self._inventory.records():
            if not record.pending:
                continue
            if record.entry.state == "incomplete":
                try:
                    find = self._finding(record, incomplete=True)
                    one = self.remove(find, wait_s=0.0, dry_run=dry_run)
                except NotCachedError:
                    continue
                except ManagementError as error:
                    kept.append((record.entry, error.message))
                    continue
                snapshots += one.snapshots
                freed += one.freed
            else:
                freed += self._clear_beside(record, dry_run=dry_run)
        artifacts, more = self._remove_orphans(dry_run=dry_run)
        if not dry_run:
            self._sweep()
        return Removal(snapshots=snapshots, artifacts=artifacts, freed=freed + more, kept=kept)

    # --- one after the other ------------------------------------------------------------------------------

    def _finding(self, record: Record, *, incomplete: bool = False) -> Callable[[], list[Record]]:
        """Return what finds one model again, as it is then; `incomplete`: unless it is whole by then."""

        def find() -> list[Record]:
            found = [each for each in self._inventory.records() if each.is_same(record)]
            if incomplete:
                found = [each for each in found if each.entry.state == "incomplete"]
            if not found:
                raise NotCachedError(f"{record.entry.name} is not on this machine any more.")
            return found

        return find

    def _remove_claimed(self, records: Sequence[Record], *, dry_run: bool) -> Removal:
        # Whatever cannot be removed is found out before anything is.
        files: list[tuple[Record, SnapshotFiles | None]] = []
        for record in records:
            files.append((record, self._files(record, [each.path for _, each in files if each is not None])))
        elsewhere = self._digests_elsewhere(records)
        freed = 0
        artifacts: dict[str, int] = {}
        for record, found in files:
            own = artifacts_of(record, elsewhere)
            artifacts |= own
            if found is not None:
                freed += found.freed
            elif record.entry.state == "incomplete":
                freed += record.entry.size
            if dry_run:
                continue
            try:
                self._remove_one(record, found, list(own))
            except OSError as error:
                raise refused(error, self._inventory) from error
            log.info("Removed %s (%s)", record.entry.name, record.entry.path)
        if not dry_run:
            digests = {digest for record in records for digest in record.digests}
            for path in self._inventory.stock.notes_on(digests - elsewhere):
                path.unlink(missing_ok=True)
        return Removal(
            snapshots=[replace(record.entry, in_use=False) for record in records],
            artifacts=list(artifacts),
            freed=freed + sum(artifacts.values()),
        )

    def _remove_one(self, record: Record, found: SnapshotFiles | None, artifacts: Sequence[str]) -> None:
        """Raises: OSError, ManagementError."""
        directory = self._inventory.manifest_dir
        marker: Path | None = None
        if found is not None:
            question = record.questions[0]
            where = places(question.hub, question.repository, found.root)
            marker = markers.removing(question, where, found.path, directory)
        # From here on the snapshot does not exist for anybody, however this ends.
        for question, _ in record.manifests:
            question.manifest_path(directory).unlink(missing_ok=True)
        for key in artifacts:
            self._inventory.stock.remove(key)
        if found is not None:
            found.remove()
        for pending in record.pending:
            if pending.doing == "fetch":
                markers.clear(pending, directory)
            else:
                markers.marker_path(pending.question, directory).unlink(missing_ok=True)
        if marker is not None:
            marker.unlink(missing_ok=True)

    def _files(self, record: Record, gone: Sequence[Path] = ()) -> SnapshotFiles | None:
        """The files to remove once those of `gone` are; None where there are none of ours. Raises: ManagementError."""
        entry = record.entry
        if not entry.owns_files or entry.path is None:
            return None
        removals = [each for each in record.pending if each.doing == "remove"]
        if not record.manifests and not removals:
            return None  # a fetch that did not end: only what it brought is removed
        if not record.manifests and any(markers.changed_since(each, entry.path) for each in removals):
            return None  # removed by half, and then fetched again by another program
        return files_of(entry.hub, entry.name, entry.path, self._inventory.roots(entry.hub), gone)

    def _digests_elsewhere(self, removed: Sequence[Record]) -> set[str]:
        """The digests of all models that stay: what was derived from them stays, too."""
        gone = {record.place for record in removed}
        return {d for record in self._inventory.records() if record.place not in gone for d in record.digests}

    # --- leftovers ----------------------------------------------------------------------------------------

    def _clear_beside(self, record: Record, *, dry_run: bool) -> int:
        """Remove what a killed fetch left beside a snapshot that is whole; return how many bytes that were."""
        if dry_run:
            return sum(markers.size_left(each, self._inventory.manifest_dir) for each in record.pending)
        directory = self._inventory.manifest_dir
        freed = 0
        for pending in record.pending:
            with contextlib.suppress(OSError):
                lock = claim(pending.question.lock_path(directory))
                if lock is None:
                    continue
                with lock:
                    if pending.doing == "fetch":
                        freed += markers.clear(pending, directory)
                    else:
                        markers.marker_path(pending.question, directory).unlink(missing_ok=True)
        return freed

    def _remove_orphans(self, *, dry_run: bool) -> tuple[list[str], int]:
        """Remove artifacts and notes whose snapshot is gone; return the artifacts, and how many bytes they were.

        Those that were never finished count, too: `_sweep` removes them.
        """
        stock = self._inventory.stock
        digests = {digest for record in self._inventory.records() for digest in record.digests}
        removed: list[str] = []
        freed = sum(size_of(path) for path in stock.unfinished())
        for artifact in stock.artifacts():
            if artifact.snapshot in digests:
                continue
            if dry_run:
                gone = not stock.is_held(artifact.key)
            else:
                held = stock.claim(artifact.key)
                if held is None:
                    continue
                with held:
                    gone = stock.remove(artifact.key)
            if gone:
                removed.append(artifact.key)
                freed += artifact.size
        if not dry_run:
            for path in stock.notes_on(digests, others=True):
                path.unlink(missing_ok=True)
        return removed, freed

    def _sweep(self) -> None:
        directory = self._inventory.manifest_dir
        self._inventory.stock.sweep()
        self._inventory.holds.sweep()
        for each in listed(directory):
            for path in listed(each, "*.lock"):
                remove_stale(path)
            for path in listed(each, ".*.tmp"):
                with contextlib.suppress(OSError):
                    if time.time() - path.stat().st_mtime > _WRITING_S:
                        path.unlink()
        self._remove_empty_directories()

    def _remove_empty_directories(self) -> None:
        directory = self._inventory.manifest_dir
        self._inventory.stock.remove_empty_directories()
        self._inventory.holds.remove_empty_directory()
        for each in (*listed(directory), directory):
            with contextlib.suppress(OSError):
                each.rmdir()


class Claims:
    """Has models and their artifacts alone, for as long as a stack stands."""

    def __init__(self, inventory: Inventory, stack: ExitStack, deadline: float) -> None:
        self._inventory = inventory
        self._stack = stack
        self._deadline = deadline
        self._taken: set[object] = set()

    def take(self, records: Sequence[Record], elsewhere: Collection[str]) -> None:
        """Claim what is not claimed yet. Raises: ModelInUseError, ManagementError."""
        inventory = self._inventory
        try:
            for record in records:
                entry = record.entry
                for lock in sorted({each.lock_path(inventory.manifest_dir) for each in record.questions}):
                    self._one(
                        entry, lock, partial(claim, lock),
                        "it is being fetched, or removed",
                    )  # fmt: skip
                if (path := entry.path) is not None:
                    self._one(
                        entry, path, partial(inventory.holds.claim, path),
                        "a process has loaded it, or is loading it",
                    )  # fmt: skip
                for key in artifacts_of(record, elsewhere):
                    self._one(
                        entry, key, partial(inventory.stock.claim, key),
                        "a process serves from what was compiled from it",
                    )  # fmt: skip
        except OSError as error:
            raise refused(error, inventory) from error

    def _one(self, entry: CachedSnapshot, what: object, take: Callable[..., Held | None], else_: str) -> None:
        if what in self._taken:
            return
        held = take(wait_s=max(0.0, self._deadline - time.monotonic()))
        if held is None:
            raise in_use(entry, else_)
        self._stack.enter_context(held)
        self._taken.add(what)


def artifacts_of(record: Record, elsewhere: Collection[str]) -> dict[str, int]:
    """The artifacts of a model, each with its size, that are not those of a model that stays."""
    return {
        artifact.key: artifact.size
        for artifact in record.entry.artifacts
        if artifact.snapshot not in elsewhere
    }


def in_use(entry: CachedSnapshot, how: str) -> ModelInUseError:
    return ModelInUseError(
        f"{entry.name} is in use: {how}. Nothing was removed. Unload it first (`emb-provider unload {entry.name}`), "
        "end the process that uses it, or wait for it (`--wait`)."
    )


def refused(error: OSError, inventory: Inventory) -> ManagementError:
    directory = inventory.manifest_dir.parent
    known = storage_error(error, directory, CACHE_SETTING)
    return ManagementError(known.message if known is not None else f"{directory} cannot be changed: {error}.")
