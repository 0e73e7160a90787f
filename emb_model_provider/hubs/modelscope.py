"""ModelScope, through its own client.

The client resumes dropped transfers, tries wrong bytes again, and checks the hashes that are listed. Its
traps are kept away from here: an unknown revision that is answered with an empty listing, paths that are
not checked, and bars and log lines that cannot be turned off.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from emb_model_provider.errors import (
    AccessDeniedError,
    CorruptSnapshotError,
    HubError,
    HubUnavailableError,
    IncompleteRepositoryError,
    ModelInUseError,
    OfflineError,
    OperationCancelledError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from emb_model_provider.hubs.caches import cache_root, modelscope_older, repository_dirs
from emb_model_provider.hubs.selection import require_all_parts, select_files
from emb_model_provider.hubs.transfer import ByteCounter, TransferCancelled, callback_class, wait_all
from emb_model_provider.progress import Progress
from emb_model_provider.snapshots import manifest
from emb_model_provider.snapshots.files import require_writable, translate_os_error
from emb_model_provider.snapshots.snapshot import Snapshot, SnapshotFile, hash_file

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from modelscope_hub import FileInfo, HubApi

    from emb_model_provider.hubs.base import HubConfig
    from emb_model_provider.progress import CancelToken, OnProgress


log = logging.getLogger(__name__)

_CACHE_SETTING = "EMB_PROVIDER_MODELSCOPE_CACHE_DIR"
_DEFAULT_REVISIONS = ("master", "main")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")


class ModelScopeHub:
    """Fetches a repository at a branch or tag. ModelScope's API does not say which commit that is."""

    def __init__(self, config: HubConfig) -> None:
        self._config = config

    def fetch(
        self, repository: str, revision: str | None, on_progress: OnProgress, cancel: CancelToken
    ) -> Snapshot:
        """Make sure the revision exists, list it, fetch what serving needs, and hash all of it."""
        if self._config.offline:
            raise self._offline(repository, revision)
        if "/" not in repository:
            raise RepositoryNotFoundError(
                f"{repository!r} cannot be a repository on ModelScope (owner/name). "
                "Check EMB_PROVIDER_MODEL_NAME."
            )
        on_progress(Progress("resolve", repository))
        api = _client(self._config)
        try:
            asked = _resolve(api, repository, revision)
            listing = self._selected(
                api.list_repo_files(repository, "model", revision=asked), repository, asked
            )
            directory = self._download(api, repository, asked, listing, on_progress, cancel)
            files = _verify(repository, directory, listing, on_progress, cancel)
        except (HubError, ModelInUseError, OperationCancelledError):
            raise
        except Exception as error:  # noqa: BLE001 (the client raises from four libraries; all are translated)
            self._translate(error, repository)
        if not self._config.partial:
            where = f"Repository {repository}@{asked} on ModelScope"
            require_all_parts(directory, (file.path for file in files), where)
        return Snapshot.of("modelscope", repository, asked, directory, files)

    def _download(
        self,
        api: HubApi,
        repository: str,
        revision: str,
        listing: list[FileInfo],
        on_progress: OnProgress,
        cancel: CancelToken,
    ) -> Path:
        """Let the client bring the files, and return the directory it put them in."""
        if self._config.cache_dir is not None:
            require_writable(self._config.cache_dir, _CACHE_SETTING)
        moved = find_update(
            self._config,
            repository,
            revision,
            {file.path: file.sha256 for file in listing},
            cache_root("modelscope", self._config.cache_dir),
        )
        if moved is not None:
            moved.require_free()
            listing = [file for file in listing if file.path in moved.changed]
        total = sum(file.size for file in listing)
        on_progress(Progress("download", repository, 0, total))
        counter = ByteCounter(repository, total, on_progress, cancel)
        pool = ThreadPoolExecutor(1, thread_name_prefix="modelscope")
        brought = pool.submit(
            api.download_repo,
            repository,
            "model",
            revision=revision,
            cache_dir=self._config.cache_dir,
            local_dir=self._older_directory(repository, listing) if moved is None else moved.beside,
            progress_callbacks=[callback_class(counter)],
            file_list=[{"Path": file.path, "Size": file.size, "Sha256": file.sha256} for file in listing],
        )
        abandon = False
        try:
            (directory,) = wait_all([brought], cancel)
        except (OperationCancelledError, KeyboardInterrupt):
            abandon = True
            self._forget_locks(repository, listing)
            raise
        except TransferCancelled:
            cancel.raise_if_cancelled()
            raise
        finally:
            pool.shutdown(wait=not abandon)
        if moved is not None:
            moved.commit()
            return moved.directory
        return directory

    def _forget_locks(self, repository: str, listing: list[FileInfo]) -> None:
        """Remove the locks of threads that are left behind. They lie among those of other repositories."""
        from modelscope_hub import _download

        # Another version of the client may name its locks otherwise; then they stay, empty, until it uses them again.
        with contextlib.suppress(AttributeError, TypeError, OSError):
            root = cache_root("modelscope", self._config.cache_dir)
            name_of: Any = _download.DownloadManager._lock_path
            for file in listing:
                name_of(None, repository, "model", cache_dir=root, file_path=file.path).unlink(
                    missing_ok=True
                )

    def _older_directory(self, repository: str, listing: list[FileInfo]) -> Path | None:
        """Where an older client keeps this repository, as far as its files have the listed sizes.

        The client looks into such a directory, too, but not into all of those that there were.
        """
        root = cache_root("modelscope", self._config.cache_dir)
        for directory in modelscope_older(root, repository):
            present = [file for file in listing if (directory / file.path).is_file()]
            if present and all((directory / file.path).stat().st_size == file.size for file in present):
                return directory
        return None

    def _offline(self, repository: str, revision: str | None) -> OfflineError:
        root = cache_root("modelscope", self._config.cache_dir)
        newest = root / "models" / repository.replace("/", "--") / "snapshots"
        revisions = [revision] if revision else list(_DEFAULT_REVISIONS)
        there = [newest / each for each in revisions] + modelscope_older(root, repository)
        found = next((path for path in there if (path / "config.json").is_file()), None)
        instead = (
            f"EMB_PROVIDER_MODEL_PATH={found}, which ModelScope's client left without hashes to check it by"
            if found is not None
            else "EMB_PROVIDER_MODEL_PATH to a directory that holds the model"
        )
        return OfflineError(
            f"No verified snapshot of {repository} from ModelScope is on this machine, and "
            f"EMB_PROVIDER_OFFLINE forbids fetching it. Start once without it, or set {instead}."
        )

    def _selected(self, files: list[FileInfo], repository: str, revision: str) -> list[FileInfo]:
        """The files of a listing that serving needs, or those of them that were asked for."""
        listing = {file.path: file for file in files if not file.is_dir}
        if not listing:
            if _COMMIT.fullmatch(revision):
                raise RevisionNotFoundError(
                    f"{repository} on ModelScope has no commit {revision}. Check EMB_PROVIDER_MODEL_REVISION."
                )
            raise IncompleteRepositoryError(
                f"Repository {repository}@{revision} on ModelScope is empty. Check EMB_PROVIDER_MODEL_NAME and "
                "EMB_PROVIDER_MODEL_REVISION."
            )
        where = f"Repository {repository}@{revision} on ModelScope"
        return [listing[path] for path in select_files(listing, self._config, repository, where)]

    def _translate(self, error: BaseException, repository: str) -> NoReturn:
        """Raise the client's error in our words."""
        from modelscope_hub import errors

        cause = error
        if isinstance(cause, errors.FileDownloadError) and cause.failed_files:
            failed = list(cause.failed_files.values())
            # Of several reasons the disk's is the one to act on.
            cause = next(
                (reason for reason in failed if isinstance(reason, OSError) and reason.errno), failed[0]
            )
        given = "the token was refused" if self._config.token else "no token was given"
        if isinstance(cause, errors.NotExistError):
            raise RepositoryNotFoundError(
                f"ModelScope has no repository {repository}, or it is private ({given}). Check "
                "EMB_PROVIDER_MODEL_NAME, or set EMB_PROVIDER_MODELSCOPE_TOKEN."
            ) from error
        if isinstance(cause, errors.AuthenticationError | errors.PermissionDeniedError):
            raise AccessDeniedError(
                f"{repository} on ModelScope is not open to us: {given} (HTTP {cause.status_code}). Set "
                "EMB_PROVIDER_MODELSCOPE_TOKEN to a token that may read it."
            ) from error
        if isinstance(cause, errors.FileIntegrityError):
            raise CorruptSnapshotError(
                f"A file of {repository} keeps arriving with other bytes than ModelScope announces, and was "
                f"removed ({self._line(cause)}). Try again later."
            ) from error
        if isinstance(cause, OSError):
            refused = translate_os_error(
                cause, self._config.cache_dir or "the ModelScope cache", _CACHE_SETTING
            )
            if refused is not None:
                raise refused from error
        raise HubUnavailableError(
            f"ModelScope could not be reached for {repository} ({type(cause).__name__}: {self._line(cause)}). "
            "Check the network and EMB_PROVIDER_MODELSCOPE_ENDPOINT, or try again later."
        ) from error

    def _line(self, error: BaseException) -> str:
        """An error's first line, without the token."""
        text = str(getattr(error, "message", None) or error).strip()
        line = next(iter(text.splitlines()), "")[:200]
        return line.replace(self._config.token, "***") if self._config.token else line


def _client(config: HubConfig) -> HubApi:
    """The client, told everything it would otherwise read from its environment, and silenced."""
    # With a handler there, the client adds none of its own and lets its lines through to the service's.
    logger = logging.getLogger("modelscope_hub")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    from modelscope_hub import HubApi, HubConfig, _download

    logger.setLevel(logging.WARNING)
    # The one thing of the client's that is replaced: it draws two bars on stderr, over ours or into a
    # container's log, and neither a parameter nor a setting turns them off (tqdm reads TQDM_DISABLE when it
    # is first imported, which may be long before). A version without this name keeps its bars.
    bars = getattr(_download, "tqdm", None)
    if isinstance(bars, type):
        setattr(_download, "tqdm", functools.partial(bars, disable=True))  # noqa: B010 (mypy: no such export)
    told: dict[str, Any] = {"endpoint": config.endpoint, "token": config.token, "cache_dir": config.cache_dir}
    return HubApi(HubConfig(**{name: value for name, value in told.items() if value is not None}))


def _resolve(api: HubApi, repository: str, revision: str | None) -> str:
    """The branch, tag or commit to fetch. The hub answers one that does not exist with an empty listing."""
    names = [str(entry.get("Revision") or "") for entry in api.list_repo_revisions(repository, "model")]
    if revision is None:
        return next((name for name in _DEFAULT_REVISIONS if name in names), _DEFAULT_REVISIONS[0])
    if revision in names or _COMMIT.fullmatch(revision):
        return revision
    raise RevisionNotFoundError(
        f"{repository} on ModelScope has no branch or tag {revision!r}; it has "
        f"{', '.join(sorted(filter(None, names))[:10]) or 'none'}. Set EMB_PROVIDER_MODEL_REVISION to one of "
        "them (the default branch is called master here, not main)."
    )


def _verify(
    repository: str,
    directory: Path,
    listing: list[FileInfo],
    on_progress: OnProgress,
    cancel: CancelToken,
) -> list[SnapshotFile]:
    """Hash every file. The client has done so for those it fetched; not every listing has hashes."""
    done, total = 0, sum(file.size for file in listing)
    files: list[SnapshotFile] = []
    for file in listing:
        cancel.raise_if_cancelled()
        hashes = hash_file(directory / file.path)
        if hashes.size != file.size or (file.sha256 and hashes.sha256 != file.sha256.lower()):
            (directory / file.path).unlink(missing_ok=True)
            raise CorruptSnapshotError(
                f"{file.path} of {repository} has other bytes than ModelScope announces, and was removed. "
                "Start again to fetch it."
            )
        files.append(SnapshotFile(file.path, hashes.size, hashes.sha256))
        done += hashes.size
        on_progress(Progress("verify", repository, done, total))
    return files


@dataclass(frozen=True, slots=True)
class StagedUpdate:
    """A snapshot that is here, of which the hub lists a newer state."""

    repository: str
    directory: Path
    """Of the snapshot."""
    beside: Path
    """Where to fetch what changed, first."""
    changed: frozenset[str]
    """Files that are new or have other bytes now."""
    manifests: Sequence[Path]
    """Those that speak for what is to be replaced."""
    is_held: Callable[[Path], bool]

    def require_free(self) -> None:
        """Raises: ModelInUseError."""
        if self.is_held(self.directory):
            raise ModelInUseError(
                f"{self.repository} is in use, and ModelScope has a newer state of it: nothing was replaced. Unload "
                f"it first (`emb-provider unload {self.repository}`), or end the process that uses it; then fetch it "
                "again."
            )

    def commit(self) -> None:
        """Replace what changed with what was fetched beside it. Hold the repository's lock.

        Raises: ModelInUseError where somebody came to use the snapshot meanwhile; OSError.
        """
        manifests = {path: path.read_bytes() for path in self.manifests if path.exists()}
        for path in manifests:
            path.unlink()
        try:
            # In this order: who holds the snapshot before this sees is refused; who comes later finds no manifest.
            self.require_free()
        except ModelInUseError:
            for path, content in manifests.items():
                path.write_bytes(content)
            raise
        for name in sorted(self.changed):
            place = self.directory / name
            place.parent.mkdir(parents=True, exist_ok=True)
            (self.beside / name).replace(place)
        shutil.rmtree(self.beside, ignore_errors=True)


def find_update(
    config: HubConfig, repository: str, revision: str, listing: Mapping[str, str | None], root: Path
) -> StagedUpdate | None:
    """Return the snapshot that fetching `listing` (path to sha256, where the hub says it) would change, if there is one.

    What only was damaged here has the same hash as before at the hub: it is not meant.
    """
    newest = repository_dirs("modelscope", repository, root)[0]
    of_branch = {newest / "snapshots" / revision, *modelscope_older(root, repository)}
    here = [
        (question, found.snapshot)
        for question, found in manifest.load_all(config.manifest_dir)
        if question.hub == "modelscope"
        and question.repository == repository
        and found.snapshot.path in of_branch
        and found.snapshot.revision == revision
    ]
    known = {file.path: file.sha256 for _, snapshot in here for file in snapshot.files}
    other = {path for path, sha256 in listing.items() if sha256 and known.get(path, sha256) != sha256.lower()}
    if not other:
        return None
    return StagedUpdate(
        repository,
        here[0][1].path,
        newest / ".newer",
        frozenset(other | (listing.keys() - known.keys())),
        [
            question.manifest_path(config.manifest_dir)
            for question, snapshot in here
            if any(file.path in other for file in snapshot.files)
        ],
        config.is_held,
    )
