"""A directory on this machine, given by its path."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from emb_model_provider.errors import HubError, RepositoryNotFoundError
from emb_model_provider.hubs import manifest
from emb_model_provider.hubs.base import Progress
from emb_model_provider.hubs.selection import require_all_parts, require_model, select
from emb_model_provider.hubs.snapshot import Snapshot, SnapshotFile, hash_file
from emb_model_provider.hubs.storage import CACHE_SETTING

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.hubs.base import HubConfig

log = logging.getLogger(__name__)


class LocalHub:
    """Serves a directory where it lies. Nothing is copied, and nothing is written into it."""

    def __init__(self, config: HubConfig) -> None:
        self._config = config

    def fetch(
        self,
        repository: str,
        revision: str | None,  # noqa: ARG002 (the Hub protocol's; a directory has one state)
        on_progress: Callable[[Progress], None],
    ) -> Snapshot:
        """Hash a directory's files, those that changed since the last time, and return them."""
        directory = Path(repository).expanduser().absolute()
        if not directory.is_dir():
            what = "is not a directory" if directory.exists() else "does not exist"
            raise RepositoryNotFoundError(
                f"The model directory {directory} {what}. Check EMB_PROVIDER_MODEL_PATH or "
                "EMB_PROVIDER_MODEL_NAME."
            )
        try:
            listed = _list_files(directory)
            paths = select(listed, with_export=True)
            require_model(paths, f"The directory {directory}", listed=listed)
            require_all_parts(directory, paths, f"The directory {directory}")
            question = manifest.Question("local", str(directory))
            return snapshot_in_place(
                question, directory, "local", paths, self._config.manifest_dir, on_progress
            )
        except OSError as error:
            raise HubError(
                f"The model directory {directory} cannot be read: {error}. Check its permissions."
            ) from error


def snapshot_in_place(
    question: manifest.Question,
    directory: Path,
    revision: str,
    paths: list[str],
    manifest_dir: Path,
    on_progress: Callable[[Progress], None],
) -> Snapshot:
    """Make a snapshot of files that stay where they are.

    Hashes that a manifest remembers are used again while a file's size and time stamp are the same. Where
    no manifest can be written there is only a warning: nothing had to be stored.

    Raises: OSError, where a file cannot be read.
    """
    before = manifest.load(question, manifest_dir)
    known: dict[str, SnapshotFile] = {}
    if before is not None and before.snapshot.path == directory:
        known = {file.path: file for file in before.snapshot.files}
    files: list[SnapshotFile] = []
    stats = {path: (directory / path).stat() for path in paths}
    done, total = 0, sum(stat.st_size for stat in stats.values())
    hashed = False
    for path, stat in stats.items():
        file = known.get(path)
        if (
            before is None
            or file is None
            or file.size != stat.st_size
            or not manifest.same_mtime(stat.st_mtime_ns, before.mtimes[path])
        ):
            hashes = hash_file(directory / path)
            file = SnapshotFile(path, hashes.size, hashes.sha256)
            hashed = True
        files.append(file)
        done += stat.st_size
        on_progress(Progress("verify", question.repository, done, total))
    snapshot = Snapshot.of(question.hub, question.repository, revision, directory, files)
    if hashed or before is None or before.snapshot.digest != snapshot.digest:
        try:
            manifest.save(question, snapshot, manifest_dir)
        except OSError as error:
            log.warning(
                "The hashes of %s cannot be kept in %s (%s): they will be computed at every start. "
                "Set %s to a directory that can be written.",
                question.repository,
                manifest_dir,
                error.strerror,
                CACHE_SETTING,
            )
    return snapshot


def _list_files(directory: Path) -> list[str]:
    """All files below a directory, hidden directories left out."""
    found: list[str] = []
    for parent, directories, names in os.walk(directory, onerror=_raise):
        directories[:] = [name for name in directories if not name.startswith(".")]
        found += [(Path(parent) / name).relative_to(directory).as_posix() for name in names]
    return found


def _raise(error: OSError) -> None:
    raise error
