"""Layouts of the hub clients' caches: where files are, and how to remove them but none of other programs."""

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

logger = logging.getLogger(__name__)

REMOTE_HUBS: tuple[HubName, ...] = ("huggingface", "modelscope")
"""Hubs whose client has a cache."""

_OLDER_PARENTS = ("models", "hub/models", "hub", ".")
"""Where ModelScope's older clients kept the directories of owners, newest layout first."""
_PARTIAL_SUFFIXES = (".incomplete", ".parallel_tmp")
"""Endings of the files that the clients have not downloaded completely."""


@dataclass(frozen=True, slots=True)
class CachedRepo:
    """A directory in a client's cache that looks like a model. Nothing says that it is complete."""

    hub: HubName
    repository: str
    revision: str | None
    path: Path


def cache_root(hub: HubName, cache_dir: Path | None) -> Path:
    """Return the directory of a client's cache, which is the client's own convention if `cache_dir` is None."""
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
    return [root / "models" / flat, *older_modelscope_dirs(root, repository)]


def older_modelscope_dirs(root: Path, repository: str) -> list[Path]:
    """Return the directories in which ModelScope's older clients kept a repository, newest layout first."""
    owner, _, name = repository.partition("/")
    names = dict.fromkeys([name.replace(".", "___"), name])  # they usually wrote a dot as three underscores
    return [root / parent / owner / each for parent in _OLDER_PARENTS for each in names]


def snapshot_dirs(hub: HubName, repository: str, root: Path) -> list[Path]:
    """Return the existing directories of a repository's snapshots."""
    current, *older = repository_dirs(hub, repository, root)
    return [*_directories(current / "snapshots"), *(path for path in older if path.is_dir() and not path.is_symlink())]


def scan_cache(hub: HubName, root: Path) -> Iterator[CachedRepo]:
    """Yield everything in a client's cache that looks like a model."""
    if hub == "huggingface":
        for repo in _directories(root):
            if repo.name.startswith("models--"):
                name = repo.name.removeprefix("models--").replace("--", "/")
                for path in _directories(repo / "snapshots"):
                    yield CachedRepo(hub, name, path.name, path)
    if hub == "modelscope":
        for repo in _directories(root / "models"):
            if "--" in repo.name:
                for path in _directories(repo / "snapshots"):
                    if list_dir(path):
                        yield CachedRepo(hub, repo.name.replace("--", "/", 1), path.name, path)
        for parent in _OLDER_PARENTS:
            for owner in _directories(root / parent):
                for path in _directories(owner):
                    if (path / "config.json").is_file() or (path / "configuration.json").is_file():
                        yield CachedRepo(hub, f"{owner.name}/{path.name.replace('___', '.')}", None, path)


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
        """Remove them, and with the last snapshot everything that the client keeps of the repository."""
        if self.strategy is not None:
            self.strategy.execute()
        else:
            shutil.rmtree(self.path, ignore_errors=True)
        if self.path.exists():
            raise ManagementError(
                f"{self.path} could not be removed. Make it writable for this user, or remove it by hand."
            )
        _tidy(self.hub, self.repository, self.path, self.root)


def files_of(
    hub: HubName, repository: str, path: Path, roots: tuple[Path, ...], removed_before: Collection[Path] = ()
) -> SnapshotFiles | None:
    """Return the files that removing a snapshot removes, or None if there are none.

    A file that only snapshots in `removed_before` share with this one is removed with it. A ManagementError is raised if
    the client would not have created the directory, because then its files may be another program's.
    """
    if not path.exists() and not path.is_symlink():
        return None
    root = _root_of(hub, repository, path, roots)
    if root is None:
        raise ManagementError(
            f"{path} is not where the client of {hub} keeps {repository}: it was left alone. Remove it by hand."
        )
    below_root = [each for each in (path, *path.parents) if each.is_relative_to(root) and each != root]
    if any(each.is_symlink() for each in below_root):
        raise ManagementError(
            f"{path} leads through a symbolic link, and its target may be another program's: it was left "
            "alone. Remove the link by hand."
        )
    strategy = None
    if hub == "huggingface":
        siblings = {each.name for each in removed_before if each.parent == path.parent}
        strategy = _strategy(repository, path, root, siblings)
    freed = strategy.expected_freed_size if strategy is not None else size_of(walk(path))
    return SnapshotFiles(hub, repository, path, root, freed, strategy)


def _root_of(hub: HubName, repository: str, path: Path, roots: tuple[Path, ...]) -> Path | None:
    """Return the cache that a snapshot's directory belongs to, or None if no client would have created it there."""
    if not path.is_absolute() or ".." in path.parts:
        return None
    flat = repository.replace("/", "--")
    if hub == "huggingface":
        is_snapshot = path.parent.name == "snapshots" and path.parents[1].name == f"models--{flat}"
        return path.parents[2] if is_snapshot else None
    for parent in path.parents:  # the name of a branch can contain slashes
        if parent.name == "snapshots" and parent.parts[-3:-1] == ("models", flat):
            return parent.parents[2]
    return next((root for root in roots if path in older_modelscope_dirs(root, repository)), None)


def _strategy(repository: str, path: Path, root: Path, removed_before: set[str]) -> DeleteCacheStrategy | None:
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
        if not any(revision.snapshot_path == path.resolve() for revision in revisions.values()):
            return None
        strategy = cache.delete_revisions(*removed_before, path.name)
    except (CacheNotFound, ValueError, OSError) as error:
        logger.warning("The Hugging Face client cannot read its cache %s: %s", root, error)
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


# --- interrupted downloads and removals -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Leftovers:
    """What an interrupted download or removal has left in a client's cache."""

    snapshots: tuple[Path, ...]
    """Directories of the snapshots that a download began."""
    files: tuple[Path, ...]
    """Files that no other snapshot uses, such as those that were not downloaded completely."""

    @property
    def paths(self) -> set[Path]:
        return {*self.files, *self.snapshots, *(path for each in self.snapshots for path in walk(each))}

    @property
    def size(self) -> int:
        # A link in a snapshot leads to one of the files, or to a file that another snapshot uses, too.
        links = {path for path in self.paths - set(self.files) if path.is_symlink()}
        return size_of(self.paths - links)


def contents(hub: HubName, repository: str, root: Path) -> Iterator[Path]:
    """Yield the directories in which a download of a repository can leave files, and everything in them."""
    for directory in repository_dirs(hub, repository, root):
        if directory.is_dir() and not directory.is_symlink():
            yield directory
            yield from walk(directory)


def leftovers(journal: Journal, complete: Collection[Path]) -> Leftovers:
    """Find what an interrupted download or removal has left; `complete` are the snapshots that have a manifest.

    Of a download, files and snapshots that existed before, or that another program changed afterwards, are not included.
    Of a removal, only blobs of the Hugging Face client are, which it removes after the snapshot that uses them.
    """
    hub, repository = journal.key.hub, journal.key.repository
    is_removal = journal.operation == "remove"
    begun: list[Path] = []
    files: list[Path] = []
    for root in journal.roots:
        snapshots = snapshot_dirs(hub, repository, root)
        own = [
            path
            for path in snapshots
            if not is_removal
            and path not in journal.before
            and not any(each.is_relative_to(path) for each in complete)
            and not journal.changed_by_others(path)
        ]
        used = {
            target
            for snapshot in snapshots
            if snapshot not in own
            for path in walk(snapshot)
            for target in _link_targets(path)
        }
        begun += own
        files += [
            path
            for path in contents(hub, repository, root)
            if (_is_blob(path) if is_removal else path not in journal.before)
            and (path.suffix in _PARTIAL_SUFFIXES or not any(path.is_relative_to(each) for each in snapshots))
            and (path.is_symlink() or path.is_file())
            and journal.is_own_change(path)
            and used.isdisjoint((str(path), os.path.realpath(path)))
        ]
    return Leftovers(tuple(begun), tuple(files))


def remove_leftovers(journal: Journal, manifest_dir: Path) -> int:
    """Remove what interrupted work has left, and its journal; return the freed bytes. The repository is locked."""
    hub, repository = journal.key.hub, journal.key.repository
    found = leftovers(journal, manifest.complete_directories(manifest_dir))
    freed = found.size
    for path in found.snapshots:
        with contextlib.suppress(ManagementError, OSError):
            if (files := files_of(hub, repository, path, journal.roots)) is not None:
                files.remove()
    for path in found.files:
        with contextlib.suppress(OSError):
            path.unlink()
    for root in journal.roots:
        if journal.path is None:
            _remove_empty_dirs(hub, repository, root, journal.before)
        elif not journal.path.exists():
            _tidy(hub, repository, journal.path, root)
        if hub == "huggingface":
            # A thread of a cancelled download can still hold the client's lock, and delay the next download. The client
            # needs the lock only to avoid downloading a file twice.
            _remove_locks(repository, root)
    journal.delete(manifest_dir)
    return freed


def remove_partial_files(journal: Journal, manifest_dir: Path) -> None:
    """Remove files that an interrupted download has left incomplete, and that a later one has not resumed."""
    for path in leftovers(journal, manifest.complete_directories(manifest_dir)).files:
        if path.suffix in _PARTIAL_SUFFIXES:
            with contextlib.suppress(OSError):
                path.unlink()


def _tidy(hub: HubName, repository: str, path: Path, root: Path) -> None:
    """Remove what a client keeps for a snapshot that was removed, and with the last snapshot for its repository."""
    if hub != "huggingface":
        # ModelScope's older clients leave a link with dots next to a directory without dots.
        alias = path.with_name(path.name.replace("___", "."))
        with contextlib.suppress(OSError):
            if alias.is_symlink() and not alias.exists():
                alias.unlink()
        remove_empty_parents(path.parent, root)
        return
    (repo,) = repository_dirs(hub, repository, root)
    with contextlib.suppress(OSError):
        (repo / "trees" / f"{path.name}.json").unlink(missing_ok=True)
    if not list_dir(repo / "snapshots"):
        if not repo.is_symlink():
            shutil.rmtree(repo, ignore_errors=True)
        _remove_locks(repository, root)


def _remove_locks(repository: str, root: Path) -> None:
    (repo,) = repository_dirs("huggingface", repository, root)
    locks = root / ".locks" / repo.name
    if not locks.is_symlink():
        shutil.rmtree(locks, ignore_errors=True)
    remove_empty_parents(locks.parent, root)


def _is_blob(path: Path) -> bool:
    return path.parent.name == "blobs" and path.suffix not in _PARTIAL_SUFFIXES


def _link_targets(path: Path) -> tuple[str, ...]:
    """Return the file that a link leads to, and the path in it, which can be a link, too."""
    try:
        return (os.path.realpath(path), os.path.normpath(path.parent / path.readlink()))
    except OSError:  # not a link
        return ()


def _remove_empty_dirs(hub: HubName, repository: str, root: Path, before: Collection[Path]) -> None:
    """Remove empty directories of a repository that did not exist before."""
    directories = [path for path in contents(hub, repository, root) if path.is_dir() and not path.is_symlink()]
    for path in sorted(directories, key=lambda path: len(path.parts), reverse=True):
        if path not in before:
            with contextlib.suppress(OSError):
                path.rmdir()
    for path in repository_dirs(hub, repository, root):
        if path not in before:
            remove_empty_parents(path, root)


def _directories(path: Path) -> list[Path]:
    try:
        with os.scandir(path) as entries:
            found = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [path / name for name in sorted(found) if not name.startswith(".")]
