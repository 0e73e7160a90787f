"""Where the hubs' clients keep their files, as far as looking at them and removing them needs it."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from emb_model_provider.errors import ManagementError
from emb_model_provider.snapshots.files import listed, size_of
from emb_model_provider.snapshots.journal import remove_empty_above

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from huggingface_hub import DeleteCacheStrategy

    from emb_model_provider.model_spec import HubName

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """A directory of a client's cache in which files of one repository may come to lie."""

    root: Path
    """The cache."""
    path: Path
    locks: bool = False
    """Whether what lies there are the client's locks."""
    shared: bool = False
    """Whether other repositories' files lie there, too."""


@dataclass(frozen=True, slots=True)
class Found:
    """What lies in a client's cache, by its place alone: nobody says that it is whole."""

    repository: str
    revision: str | None
    path: Path


def cache_root(hub: HubName, cache_dir: Path | None) -> Path:
    """The directory of a client's cache: `cache_dir`, or the client's own convention where that is None."""
    if cache_dir is not None:
        return cache_dir.expanduser().absolute()
    if hub == "huggingface":
        from huggingface_hub.constants import HF_HUB_CACHE

        return Path(HF_HUB_CACHE).expanduser().absolute()
    from modelscope_hub import HubConfig

    return Path(HubConfig().cache_dir).expanduser().absolute()


def places(hub: HubName, repository: str, root: Path) -> tuple[Place, ...]:
    """Where a fetch of a repository may leave files; none for hubs whose files are not ours."""
    flat = repository.replace("/", "--")
    if hub == "huggingface":
        name = f"models--{flat}"
        return Place(root, root / name), Place(root, root / ".locks" / name, locks=True)
    if hub == "modelscope":
        inside = [root / "models" / flat, *modelscope_older(root, repository)]
        return (*(Place(root, path) for path in inside), Place(root, root / ".lock", locks=True, shared=True))
    return ()


def modelscope_older(root: Path, repository: str) -> list[Path]:
    """Directories in which ModelScope's older clients kept a repository, newest layout first.

    They wrote a dot in a name as three underscores, most of the time.
    """
    owner, _, name = repository.partition("/")
    names = dict.fromkeys([name.replace(".", "___"), name])
    parents = ("models", "hub/models", "hub", ".")
    return [root / parent / owner / each for parent in parents for each in names]


def root_of(hub: HubName, repository: str, path: Path, roots: tuple[Path, ...]) -> Path | None:
    """The cache that a snapshot's directory belongs to, or None where no client would have put it there.

    `roots` are the caches that are known of. Another one is believed where the directory's own name and its
    parents' are those of the newest layout.
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
    for parent in path.parents:  # a branch may have slashes in its name
        if parent.name == "snapshots" and parent.parts[-3:-1] == ("models", flat):
            return parent.parents[2]
    return next((root for root in roots if path in modelscope_older(root, repository)), None)


def all_in(hub: HubName, root: Path) -> Iterator[Found]:
    """Everything that lies in a client's cache and looks like a model."""
    if hub == "huggingface":
        for repo in _directories(root):
            if repo.name.startswith("models--"):
                name = repo.name.removeprefix("models--").replace("--", "/")
                for path in _directories(repo / "snapshots"):
                    yield Found(name, path.name, path)
    if hub == "modelscope":
        for repo in _directories(root / "models"):
            if "--" in repo.name:
                for path in _directories(repo / "snapshots"):
                    if listed(path):
                        yield Found(repo.name.replace("--", "/", 1), path.name, path)
        yield from _older_in(root)


def _older_in(root: Path) -> Iterator[Found]:
    for parent in ("models", "hub/models", "hub", "."):
        for owner in _directories(root / parent):
            for path in _directories(owner):
                if (path / "config.json").is_file() or (path / "configuration.json").is_file():
                    yield Found(f"{owner.name}/{path.name.replace('___', '.')}", None, path)


def _directories(path: Path) -> list[Path]:
    try:
        with os.scandir(path) as entries:
            found = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []
    return [path / name for name in sorted(found) if not name.startswith(".")]


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
