"""Removing a snapshot's files from the cache of the client that put them there, and nothing else."""

from __future__ import annotations

import contextlib
import logging
import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from emb_model_provider.errors import ManagementError
from emb_model_provider.hubs.layout import places, root_of
from emb_model_provider.hubs.pending import remove_empty_above
from emb_model_provider.hubs.storage import everything_below, listed

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from huggingface_hub import DeleteCacheStrategy

    from emb_model_provider.hubs.base import HubName

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SnapshotFiles:
    """The files of one snapshot in a client's cache."""

    hub: HubName
    repository: str
    path: Path
    root: Path
    """The cache."""
    freed: int
    """Bytes that removing them gives back: what other revisions use, too, is not counted."""
    plan: DeleteCacheStrategy | None

    def remove(self) -> None:
        """Remove them, with what the client keeps for the repository once its last snapshot is gone.

        Raises: ManagementError where files stay.
        """
        if self.plan is not None:
            self.plan.execute()
        else:
            shutil.rmtree(self.path, ignore_errors=True)
        if self.path.exists():
            raise ManagementError(
                f"{self.path} could not be removed. Make it writable for this user, or remove it by hand."
            )
        if self.hub == "huggingface":
            self._tidy_huggingface()
        else:
            self._unlink_alias()
            remove_empty_above(self.path.parent, self.root)

    def _tidy_huggingface(self) -> None:
        repo, locks = (place.path for place in places("huggingface", self.repository, self.root))
        with contextlib.suppress(OSError):
            (repo / "trees" / f"{self.path.name}.json").unlink(missing_ok=True)
        snapshots = repo / "snapshots"
        if not listed(snapshots):
            for directory in (repo, locks):
                if not directory.is_symlink():
                    shutil.rmtree(directory, ignore_errors=True)
        remove_empty_above(locks.parent, self.root)

    def _unlink_alias(self) -> None:
        """ModelScope's older clients leave a link of the name with dots beside a directory without."""
        alias = self.path.with_name(self.path.name.replace("___", "."))
        with contextlib.suppress(OSError):
            if alias.is_symlink() and not alias.exists():
                alias.unlink()


def files_of(
    hub: HubName, repository: str, path: Path, roots: tuple[Path, ...], gone: Collection[Path] = ()
) -> SnapshotFiles | None:
    """Find what removing a snapshot removes; None where there is nothing. `roots`: the caches that are known of.

    `gone`: snapshots that are removed before it. A file that only they share with it goes with it.

    Raises: ManagementError where the directory is not one that the hub's client could have made.
    """
    if not path.exists() and not path.is_symlink():
        return None
    root = root_of(hub, repository, path, roots)
    if root is None:
        raise ManagementError(
            f"{path} is not where the client of {hub} keeps {repository}: it was left alone. Remove it by hand."
        )
    linked = [each for each in (path, *path.parents) if each.is_relative_to(root) and each != root]
    if any(each.is_symlink() for each in linked):
        raise ManagementError(
            f"{path} leads through a symbolic link, and what it points to may be somebody else's: it was left "
            "alone. Remove the link by hand."
        )
    if hub == "huggingface":
        plan = _plan(repository, path, root, {each.name for each in gone if each.parent == path.parent})
        freed = plan.expected_freed_size if plan is not None else size_of(path)
        return SnapshotFiles(hub, repository, path, root, freed, plan)
    return SnapshotFiles(hub, repository, path, root, size_of(path), None)


def size_of(path: Path) -> int:
    """Bytes of all files below a directory, each counted once; of a link, those of what it points to.

    Goes into no linked directory.
    """
    sizes: dict[tuple[int, int], int] = {}
    for file in everything_below(path):
        with contextlib.suppress(OSError):
            if file.is_file():
                found = file.stat()
                sizes[found.st_dev, found.st_ino] = found.st_size
    return sum(sizes.values())


def _plan(repository: str, path: Path, root: Path, gone: set[str]) -> DeleteCacheStrategy | None:
    """What the client itself would remove once the revisions that are `gone` are; None where it does not take the directory for a whole snapshot."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    repo = places("huggingface", repository, root)[0].path.resolve()
    try:
        scanned = scan_cache_dir(root)
        whole = any(
            revision.snapshot_path == path.resolve()
            for found in scanned.repos
            if found.repo_path.resolve() == repo
            for revision in found.revisions
        )
        # Only this repository: the same commit can be in another one, a copy under a new name.
        ours = frozenset(found for found in scanned.repos if found.repo_path.resolve() == repo)
        cache = replace(scanned, repos=ours)
        gone &= {revision.commit_hash for found in ours for revision in found.revisions}
        before = cache.delete_revisions(*gone)
        plan = cache.delete_revisions(*gone, path.name) if whole else None
    except (CacheNotFound, ValueError, OSError) as error:
        log.warning("The Hugging Face client cannot read its cache %s: %s", root, error)
        return None
    if plan is None:
        return None
    # A link in a snapshot may point anywhere; only the repository's own store of blobs is emptied.
    blobs = frozenset(blob for blob in plan.blobs - before.blobs if blob.is_relative_to(repo / "blobs"))
    return replace(
        plan,
        blobs=blobs,
        refs=plan.refs - before.refs,
        snapshots=plan.snapshots - before.snapshots,
        expected_freed_size=plan.expected_freed_size - before.expected_freed_size,
    )
