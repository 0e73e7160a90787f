"""Layouts of the hub clients' caches: where their files are, and how to remove them without touching others' files."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from emb_model_provider.errors import ManagementError
from emb_model_provider.snapshots import manifest
from emb_model_provider.snapshots.files import list_dir, remove_empty_parents, size_of, walk

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from huggingface_hub import DeleteCacheStrategy

    from emb_model_provider.model_spec import HubName
    from emb_model_provider.snapshots.journal import Journal

log = logging.getLogger(__name__)

REMOTE_HUBS: tuple[HubName, ...] = ("huggingface", "modelscope")
"""Hubs whose client has a cache."""

_PARTIAL_SUFFIXES = (".incomplete", ".parallel_tmp")
"""Endings of the files that the clients have not downloaded completely."""


@dataclass(frozen=True, slots=True)
class CachedRepo:
    """A directory in a client's cache that looks like a model. Nothing says that it is complete."""

    repository: str
    revision: str | None
    path: Path


def cache_root(hub: HubName, cache_dir: Path | None) -> Path:
    """Return the directory of a client's cache: `cache_dir`, or the client's own convention if that is None."""
    if cache_dir is not None:
        return cache_dir.expanduser().absolute()
    if hub == "huggingface":
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(HF_HUB_CACHE).expanduser().absolute()
    from modelscope_hub import HubConfig

    return Path(HubConfig().cache_dir).expanduser().absolute()


def repository_dirs(hub: HubName, repository: str, root: Path) -> list[Path]:
    """Return the directories in which a download of a repository can leave files, the current layout first."""
    flat = repository.replace("/", "--")
    if hub == "huggingface":
        return [root / f"models--{flat}"]
    if hub == "modelscope":
        return [root / "models" / flat, *modelscope_older(root, repository)]
    return []


def modelscope_older(root: Path, repository: str) -> list[Path]:
    """Return the directories in which ModelScope's older clients kept a repository, newest layout first.

    They usually wrote a dot in a name as three underscores.
    """
    owner, _, name = repository.partition("/")
    names = dict.fromkeys([name.replace(".", "___"), name])
    parents = ("models", "hub/models", "hub", ".")
    return [root / parent / owner / each for parent in parents for each in names]


def snapshot_dirs(hub: HubName, repository: str, root: Path) -> list[Path]:
    """Return the existing directories of a repository's snapshots."""
    current, *older = repository_dirs(hub, repository, root)
    return [*_directories(current / "snapshots"), *(path for path in older if path.is_dir())]


def root_of(hub: HubName, repository: str, path: Path, roots: tuple[Path, ...]) -> Path | None:
    """Return the cache that a snapshot's directory belongs to, or None if no client would have created it there.

    Args:
        hub: The hub.
        repository: The repository.
        path: The directory of the snapshot.
        roots: The configured caches. The current layout is recognized outside of them, too.
    """
    if not path.is_absolute() or ".." in path.parts:
        return None
    flat = repository.replace("/", "--")
    if hub == "huggingface":
        if path.parent.name == "snapshots" and path.parents[1].name == f"models--{flat}":
            return path.parents[2]
        return None
    if hub != "modelscope":
        return None
    for parent in path.parents:  # the name of a branch can contain slashes
        if parent.name == "snapshots" and parent.parts[-3:-1] == ("models", flat):
            return parent.parents[2]
    return next((root for root in roots if path in modelscope_older(root, repository)), None)


def scan_cache(hub: HubName, root: Path) -> Iterator[CachedRepo]:
    """Yield everything in a client's cache that looks like a model."""
    if hub == "huggingface":
        for repo in _directories(root):
            if repo.name.startswith("models--"):
                name = repo.name.removeprefix("models--").replace("--", "/")
                for path in _directories(repo / "snapshots"):
                    yield CachedRepo(name, path.name, path)
    if hub == "modelscope":
        for repo in _directories(root / "models"):
            if "--" in repo.name:
                for path in _directories(repo / "snapshots"):
                    if list_dir(path):
                        yield CachedRepo(repo.name.replace("--", "/", 1), path.name, path)
        yield from _scan_older(root)


# --- removing snapshots -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SnapshotFiles:
    """The files of one snapshot in a client's cache, and how to remove them."""

    hub: HubName
    repository: str
    path: Path
    root: Path
    """The cache."""
    freed: int
    """Bytes that removing them frees; files that other revisions use are not counted."""
    strategy: DeleteCacheStrategy | None

    def remove(self) -> None:
        """Remove them, and with the last snapshot everything that the client keeps of the repository.

        Raises:
            ManagementError: Files are left.
        """
        if self.strategy is not None:
            self.strategy.execute()
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
            remove_empty_parents(self.path.parent, self.root)

    def _tidy_huggingface(self) -> None:
        (repo,) = repository_dirs("huggingface", self.repository, self.root)
        locks = self.root / ".locks" / repo.name
        with contextlib.suppress(OSError):
            (repo / "trees" / f"{self.path.name}.json").unlink(missing_ok=True)
        if not list_dir(repo / "snapshots"):
            for directory in (repo, locks):
                if not directory.is_symlink():
                    shutil.rmtree(directory, ignore_errors=True)
        remove_empty_parents(locks.parent, self.root)

    def _unlink_alias(self) -> None:
        """Remove the link with dots that ModelScope's older clients leave beside a directory without dots."""
        alias = self.path.with_name(self.path.name.replace("___", "."))
        with contextlib.suppress(OSError):
            if alias.is_symlink() and not alias.exists():
                alias.unlink()


def files_of(
    hub: HubName, repository: str, path: Path, roots: tuple[Path, ...], removed_before: Collection[Path] = ()
) -> SnapshotFiles | None:
    """Return the files that removing a snapshot removes, or None if there are none.

    Args:
        hub: The hub.
        repository: The repository.
        path: The directory of the snapshot.
        roots: The configured caches.
        removed_before: Snapshots that are removed first. A file that only they share with this one is removed with it.

    Raises:
        ManagementError: The client would not have created the directory, so that its files may be somebody else's.
    """
    if not path.exists() and not path.is_symlink():
        return None
    root = root_of(hub, repository, path, roots)
    if root is None:
        raise ManagementError(
            f"{path} is not where the client of {hub} keeps {repository}: it was left alone. Remove it by hand."
        )
    below_root = [each for each in (path, *path.parents) if each.is_relative_to(root) and each != root]
    if any(each.is_symlink() for each in below_root):
        raise ManagementError(
            f"{path} leads through a symbolic link, and its target may be somebody else's: it was left "
            "alone. Remove the link by hand."
        )
    if hub == "huggingface":
        siblings = {each.name for each in removed_before if each.parent == path.parent}
        strategy = _strategy(repository, path, root, siblings)
        freed = strategy.expected_freed_size if strategy is not None else size_of(path)
        return SnapshotFiles(hub, repository, path, root, freed, strategy)
    return SnapshotFiles(hub, repository, path, root, size_of(path), None)


def _strategy(
    repository: str, path: Path, root: Path, removed_before: set[str]
) -> DeleteCacheStrategy | None:
    """Return what the client itself would remove after some revisions, or None if it does not know the snapshot."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    repo = repository_dirs("huggingface", repository, root)[0].resolve()
    try:
        scanned = scan_cache_dir(root)
        # Only this repository, because a copy under another name can contain the same commit.
        own = frozenset(found for found in scanned.repos if found.repo_path.resolve() == repo)
        cache = replace(scanned, repos=own)
        revisions = {revision.commit_hash: revision for found in own for revision in found.revisions}
        removed_before &= revisions.keys()
        before = cache.delete_revisions(*removed_before)
        known = any(revision.snapshot_path == path.resolve() for revision in revisions.values())
        strategy = cache.delete_revisions(*removed_before, path.name) if known else None
    except (CacheNotFound, ValueError, OSError) as error:
        log.warning("The Hugging Face client cannot read its cache %s: %s", root, error)
        return None
    if strategy is None:
        return None
    # A link in a snapshot can lead anywhere: only the repository's own blobs are removed.
    blobs = frozenset(blob for blob in strategy.blobs - before.blobs if blob.is_relative_to(repo / "blobs"))
    return replace(
        strategy,
        blobs=blobs,
        refs=strategy.refs - before.refs,
        snapshots=strategy.snapshots - before.snapshots,
        expected_freed_size=strategy.expected_freed_size - before.expected_freed_size,
    )


# --- interrupted downloads --------------------------------------------------------------------------------


def leftovers(journal: Journal, manifest_dir: Path) -> tuple[list[Path], list[Path]]:
    """Return what an interrupted download has left: snapshots that it began, and files that it has not completed.

    Snapshots that existed before, that have a manifest, or that another program changed afterwards are not included,
    nor are the files that another program is downloading.
    """
    if journal.operation != "fetch":
        return [], []
    hub, repository = journal.key.hub, journal.key.repository
    complete = {found.snapshot.path for _, found in manifest.load_all(manifest_dir)}
    begun: list[Path] = []
    partial: list[Path] = []
    for root in journal.roots:
        begun += [
            path
            for path in snapshot_dirs(hub, repository, root)
            if path not in journal.before and path not in complete and not journal.changed_by_others(path)
        ]
        partial += [
            path
            for directory in repository_dirs(hub, repository, root)
            for path in walk(directory)
            if path.suffix in _PARTIAL_SUFFIXES and journal.is_own_change(path)
        ]
    return begun, partial


def leftover_size(journal: Journal, manifest_dir: Path) -> int:
    """Return the size of what an interrupted download has left, in bytes."""
    begun, partial = leftovers(journal, manifest_dir)
    files = {path for directory in begun for path in walk(directory)} | set(partial)
    sizes: dict[tuple[int, int], int] = {}
    for file in files:
        with contextlib.suppress(OSError):
            if file.is_file():
                stat = file.stat()
                sizes[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(sizes.values())


def remove_leftovers(journal: Journal, manifest_dir: Path) -> int:
    """Remove what an interrupted download has left, and its journal. The caller holds the repository's lock.

    Returns:
        How many bytes were freed.
    """
    freed = leftover_size(journal, manifest_dir)
    begun, partial = leftovers(journal, manifest_dir)
    for path in partial:
        with contextlib.suppress(OSError):
            path.unlink()
    hub, repository = journal.key.hub, journal.key.repository
    for path in begun:
        with contextlib.suppress(ManagementError, OSError):
            if (files := files_of(hub, repository, path, journal.roots)) is not None:
                files.remove()
    for root in journal.roots:
        _remove_unused(hub, repository, root)
    journal.delete(manifest_dir)
    return freed


def _remove_unused(hub: HubName, repository: str, root: Path) -> None:
    """Remove the directory of a repository that has no snapshot, and the empty directories of one that has."""
    current, *older = repository_dirs(hub, repository, root)
    if hub == "huggingface" and current.is_dir() and not list_dir(current / "snapshots"):
        shutil.rmtree(current, ignore_errors=True)
        shutil.rmtree(root / ".locks" / current.name, ignore_errors=True)
        remove_empty_parents(root / ".locks", root)
    for directory in (current, *older):
        if directory.is_dir():
            for path in sorted(walk(directory), key=lambda path: len(path.parts), reverse=True):
                if path.is_dir() and not path.is_symlink():
                    with contextlib.suppress(OSError):
                        path.rmdir()
        remove_empty_parents(directory, root)


def _scan_older(root: Path) -> Iterator[CachedRepo]:
    for parent in ("models", "hub/models", "hub", "."):
        for owner in _directories(root / parent):
            for path in _directories(owner):
                if (path / "config.json").is_file() or (path / "configuration.json").is_file():
                    yield CachedRepo(f"{owner.name}/{path.name.replace('___', '.')}", None, path)


def _directories(path: Path) -> list[Path]:
    try:
        with os.scandir(path) as entries:
            found = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [path / name for name in sorted(found) if not name.startswith(".")]
