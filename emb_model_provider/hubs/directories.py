"""Directories on this machine as they are found: what files they have, and which model is meant."""

from __future__ import annotations

import logging
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from emb_model_provider.errors import IncompleteRepositoryError
from emb_model_provider.hubs.selection import is_document, select
from emb_model_provider.snapshots.files import list_dir
from emb_model_provider.snapshots.weights import ADAPTER_CONFIG

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

_CONFIGS = ("config.json", "modules.json", ADAPTER_CONFIG)
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".onnx", ".xml", ".gguf", ".h5", ".msgpack")
_MODULE_FOLDER = re.compile(r"\d+_[A-Za-z]\w*")
_EXPORT_FOLDERS = ("onnx", "openvino")
_SNAPSHOTS = (
    ("snapshots",),  # the directory of one repository
    ("*--*", "snapshots"),  # the cache of the Hugging Face client, or `models` of ModelScope's
    ("hub", "*--*", "snapshots"),
    ("models", "*--*", "snapshots"),
)
"""Where the clients of the hubs keep the snapshots of a repository, below a directory that is not a model."""
_MODELS = (("*",), ("*", "*"), ("models", "*"), ("models", "*", "*"), ("hub", "*", "*"), ("hub", "models", "*", "*"))
"""Where other directories have their models: `name`, or `owner/name` as ModelScope's older clients write it."""
_DEFAULT_REVISIONS = ("master", "main")
_MAX_PATHS_SHOWN = 20


@dataclass(frozen=True, slots=True)
class DirectoryFiles:
    """The files below a directory. Links are followed."""

    files: frozenset[str]
    """Paths with forward slashes."""
    broken_links: frozenset[str]
    """Links to something that does not exist."""


def locate_model(directory: Path) -> Path:
    """Return the directory of a model: `directory` itself, or the only model in it if it is a cache or a parent directory.

    Raises:
        IncompleteRepositoryError: It contains several models; the message lists them.
    """
    if _has_model_files(directory):
        return directory
    found = [path for pattern in _SNAPSHOTS for parent in _expand(directory, pattern) for path in _current(parent)]
    if not found:
        found = [path for pattern in _MODELS for path in _expand(directory, pattern) if _is_model(path)]
    # ModelScope's older clients leave a link with another name next to a model.
    models = {os.path.realpath(path): path for path in reversed(found)}
    nested = {real for real in models for other in models if Path(other) in Path(real).parents}
    paths = sorted(path for real, path in models.items() if real not in nested)
    if len(paths) > 1:
        shown = "".join(f"\n  {path}" for path in paths[:_MAX_PATHS_SHOWN])
        more = f"\n  and {len(paths) - _MAX_PATHS_SHOWN} more" if len(paths) > _MAX_PATHS_SHOWN else ""
        raise IncompleteRepositoryError(
            f"The directory {directory} is not a model, and contains several. Name one of them in its "
            f"place (EMB_PROVIDER_MODEL_PATH):{shown}{more}"
        )
    if not paths:
        return directory
    logger.info("The directory %s is not a model; using the one in it: %s", directory, paths[0])
    return paths[0]


def list_files(directory: Path) -> DirectoryFiles:
    """List all files below a directory, except those in hidden directories. Raises OSError."""
    files: set[str] = set()
    broken: set[str] = set()
    top = Path(os.path.realpath(directory))
    ancestors: dict[str, tuple[Path, ...]] = {str(directory): (top,)}
    for parent, directories, names in os.walk(directory, onerror=_raise, followlinks=True):
        above = ancestors.pop(parent)
        followed: list[str] = []
        for name in directories:
            real = Path(os.path.realpath(Path(parent, name)))
            # A link to a directory that contains it would be followed without end.
            if not name.startswith(".") and real not in above and real not in top.parents:
                followed.append(name)
                ancestors[os.path.join(parent, name)] = (*above, real)  # noqa: PTH118 - as os.walk joins them
        directories[:] = followed
        for name in names:
            path = Path(parent, name)
            (files if path.exists() else broken).add(path.relative_to(directory).as_posix())
    return DirectoryFiles(frozenset(files), frozenset(broken))


def select_present(directory: Path, found: DirectoryFiles) -> list[str]:
    """Return the files of a directory that serving needs.

    Raises:
        IncompleteRepositoryError: One of them is a link to something that does not exist.
    """
    selected = select(found.files, with_export=True)
    expected = set(select(found.files | found.broken_links)) - set(selected)
    missing = sorted(path for path in expected & found.broken_links if not is_document(path))
    if missing:
        path = directory / missing[0]
        raise IncompleteRepositoryError(
            f"{missing[0]} in the directory {directory} is a link to {os.readlink(path)}, which does not exist. Restore "  # noqa: PTH115 - the text of the link
            "the file, or download the model again."
        )
    return selected


def _current(snapshots: Path) -> Iterator[Path]:
    """Yield the snapshot that a client would use now, or all of them if that is not known."""
    models = {path.name: path for path in list_dir(snapshots) if _is_model(path)}
    ref = snapshots.parent / "refs" / "main"
    try:
        wanted = [ref.read_text(encoding="utf-8").strip()]
    except (OSError, ValueError):
        wanted = [*_DEFAULT_REVISIONS]
    current = next((models[name] for name in wanted if name in models), None)
    yield from [current] if current is not None else models.values()


def _expand(directory: Path, pattern: tuple[str, ...]) -> Iterator[Path]:
    """Yield the directories that match a pattern, except hidden ones and those of a model's modules."""
    if not pattern:
        yield directory
        return
    for path in list_dir(directory, pattern[0]):
        if not path.name.startswith(".") and not _MODULE_FOLDER.fullmatch(path.name) and path.is_dir():
            yield from _expand(path, pattern[1:])


def _is_model(directory: Path) -> bool:
    if not directory.is_dir():
        return False
    names = {path.name for path in list_dir(directory)}
    if names & {"modules.json", ADAPTER_CONFIG}:
        return True
    folders = [folder for folder in _EXPORT_FOLDERS if folder in names]
    names |= {path.name for folder in folders for path in list_dir(directory / folder)}
    return "config.json" in names and any(name.endswith(_WEIGHT_SUFFIXES) for name in names)


def _has_model_files(directory: Path) -> bool:
    """Return whether a directory has files of a model, so that an error about it is not one about a directory of models."""
    return any(path.name in _CONFIGS or path.name.endswith(_WEIGHT_SUFFIXES) for path in list_dir(directory))


def _raise(error: OSError) -> NoReturn:
    raise error
