"""Where the hubs' clients keep their files, as far as looking at them and removing them needs it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from emb_model_provider.hubs.storage import listed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emb_model_provider.hubs.base import HubName


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
