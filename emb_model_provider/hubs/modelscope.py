"""ModelScope, through its own client.

The client resumes transfers, retries files with wrong bytes, and checks the hashes of the listing. But it does not check
paths, draws progress bars, and replaces the files of a branch in place (see StagedUpdate).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from dataclasses import dataclass
from functools import cached_property, partial
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
from emb_model_provider.formatting import first_line
from emb_model_provider.hubs.caches import cache_root, older_modelscope_dirs, repository_dirs
from emb_model_provider.hubs.listing import bind_session, bounded_files, bounded_listing, require_size
from emb_model_provider.hubs.network import advice_about, ask, share_certificates
from emb_model_provider.hubs.selection import require_all_parts, select_files
from emb_model_provider.hubs.transfer import ByteCounter, RemoteFile, callback_class, run_all, verify_files
from emb_model_provider.progress import Progress
from emb_model_provider.snapshots import manifest
from emb_model_provider.snapshots.files import (
    remove_empty_parents,
    require_writable,
    translate_os_error,
    write_atomically,
)
from emb_model_provider.snapshots.locks import SnapshotLocks
from emb_model_provider.snapshots.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from modelscope_hub import HubApi
    from modelscope_hub import HubConfig as ClientConfig

    from emb_model_provider.hubs.base import HubConfig, HubState
    from emb_model_provider.progress import CancelToken, OnProgress

_CACHE_SETTING = "EMB_PROVIDER_MODELSCOPE_CACHE_DIR"
_DEFAULT_REVISIONS = ("master", "main")
_COMMIT = re.compile(r"[0-9a-f]{7,40}")
_MAX_REVISIONS_SHOWN = 10
_STAGING = ".newer"


class ModelScopeHub:
    """Downloads a repository at a branch or tag. ModelScope's API does not report the commit."""

    def __init__(self, config: HubConfig) -> None:
        share_certificates()
        self._config = config

    def fetch(self, repository: str, revision: str | None, on_progress: OnProgress, cancel: CancelToken) -> Snapshot:
        """Check that the revision exists, list it, download the files that serving needs, and hash them all."""
        if self._config.offline:
            raise self._offline(repository, revision)
        if "/" not in repository:
            raise RepositoryNotFoundError(
                f"{repository!r} is not a valid repository id on ModelScope (owner/name). Check the name."
            )
        on_progress(Progress("resolve", repository))
        try:
            check = cancel.raise_if_cancelled
            resolved = ask("ModelScope", lambda: self._resolve(repository, revision), check, _pause_after)
            files = ask("ModelScope", lambda: self._select(repository, resolved), check, _pause_after)
            directory = self._download(repository, resolved, files, on_progress, cancel)
            verified = verify_files(repository, directory, files, partial(_reject, repository, directory), on_progress)
        except (HubError, ModelInUseError, OperationCancelledError):
            raise
        except Exception as error:  # the client raises errors of four libraries
            raise self._translate(error, repository) from error
        if not self._config.patterns:
            origin = f"Repository {repository}@{resolved} on ModelScope"
            require_all_parts(directory, (file.path for file in verified), origin)
        return Snapshot.of("modelscope", repository, resolved, directory, verified)

    # --- connectivity ---------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        return str(self._client_config.endpoint)

    @property
    def token(self) -> str | None:
        return self._client_config.token

    def check_token(self) -> None:
        self._api.whoami()

    def check_repository(self, repository: str, timeout_s: float) -> None:  # noqa: ARG002 - the client has no timeout
        self._api.list_repo_revisions(repository, "model")

    def search(self, text: str, limit: int) -> list[str]:
        found = self._api.list_repos("model", search=text, sort="downloads", page_size=limit).items
        return [each.repo_id for each in found if each.repo_id is not None]

    def classify(self, error: BaseException) -> HubState:
        from modelscope_hub import errors

        if isinstance(error, errors.AuthenticationError | errors.PermissionDeniedError):
            return "refuses"
        if isinstance(error, errors.NotExistError):
            return "lacks"
        return "fails" if isinstance(error, errors.APIError) else "silent"

    # --- downloading ----------------------------------------------------------------------------------

    @cached_property
    def _client_config(self) -> ClientConfig:
        """The client's configuration, explicit as far as ours goes, and by its environment otherwise."""
        # If the logger has a handler, the client adds none and passes its lines on to the service's handlers.
        logger = logging.getLogger("modelscope_hub")
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
        from modelscope_hub import HubConfig as ClientConfig
        from modelscope_hub import _download

        logger.setLevel(logging.WARNING)
        # The client draws two bars on stderr, and has no option against it: tqdm reads TQDM_DISABLE when it is first
        # imported, which can be long before. A version of the client without this name keeps its bars.
        bars = getattr(_download, "tqdm", None)
        if isinstance(bars, type):
            setattr(_download, "tqdm", partial(bars, disable=True))  # noqa: B010 - mypy: no such export
        options = {name: getattr(self._config, name) for name in ("endpoint", "token", "cache_dir")}
        return ClientConfig(**{name: value for name, value in options.items() if value is not None})

    @cached_property
    def _api(self) -> HubApi:
        config = self._client_config
        from modelscope_hub import HubApi

        api = HubApi(config)
        # Another version of the client can name its sessions otherwise: then only the number of files is bounded.
        for name in ("_session", "_read_session"):
            if (session := getattr(api.legacy, name, None)) is not None:
                bind_session(session)
        return api

    @cached_property
    def _root(self) -> Path:
        return cache_root("modelscope", self._config.cache_dir)

    def _resolve(self, repository: str, revision: str | None) -> str:
        """Return the branch, tag or commit to download. For an unknown one the hub returns an empty listing."""
        entries = self._api.list_repo_revisions(repository, "model")
        names = [str(entry.get("Revision") or "") for entry in entries]
        if revision is None:
            return next((name for name in _DEFAULT_REVISIONS if name in names), _DEFAULT_REVISIONS[0])
        if revision in names or _COMMIT.fullmatch(revision):
            return revision
        existing = ", ".join(sorted(filter(None, names))[:_MAX_REVISIONS_SHOWN]) or "none"
        raise RevisionNotFoundError(
            f"{repository} on ModelScope has no branch or tag {revision!r}; it has {existing}. Name one of "
            "them: `--revision`, or EMB_PROVIDER_MODEL_REVISION (the default branch is called master here, not main)."
        )

    def _select(self, repository: str, revision: str) -> list[RemoteFile]:
        """Return the files of a revision that serving needs, or those of them that were requested."""
        with bounded_listing():
            listed = list(bounded_files(self._api.list_repo_files(repository, "model", revision=revision)))
        files = {
            entry.path: RemoteFile(
                entry.path, require_size(entry.path, entry.size), entry.sha256.lower() if entry.sha256 else None
            )
            for entry in listed
            if not entry.is_dir
        }
        if not files:
            if _COMMIT.fullmatch(revision):
                raise RevisionNotFoundError(f"{repository} on ModelScope has no commit {revision}. Check the revision.")
            raise IncompleteRepositoryError(
                f"Repository {repository}@{revision} on ModelScope is empty. Check its name and the revision."
            )
        origin = f"Repository {repository}@{revision} on ModelScope"
        return [files[path] for path in select_files(files, self._config.patterns, repository, origin)]

    def _download(
        self, repository: str, revision: str, files: Sequence[RemoteFile], on_progress: OnProgress, cancel: CancelToken
    ) -> Path:
        """Download files and return the directory of the snapshot."""
        require_writable(self._root, _CACHE_SETTING)
        update = find_update(self._config, repository, revision, files, self._root)
        if update is not None:
            update.require_unused()
            files = [file for file in files if file.path in update.changed]
        total = sum(file.size for file in files)
        on_progress(Progress("download", repository, 0, total))
        counter = ByteCounter(repository, total, on_progress, cancel)
        download = partial(
            self._api.download_repo,
            repository,
            "model",
            revision=revision,
            cache_dir=self._config.cache_dir,
            local_dir=update.staging if update is not None else self._older_directory(repository, files),
            progress_callbacks=[callback_class(counter)],
            file_list=[{"Path": file.path, "Size": file.size, "Sha256": file.sha256} for file in files],
        )
        try:
            (directory,) = run_all([download], counter, threads=1)
        except (OperationCancelledError, KeyboardInterrupt):
            self._remove_locks(repository, files)
            raise
        if update is not None:
            update.commit()
            directory = update.directory
        # Even without an update, because one that was killed while it replaced files has left others and no manifest.
        shutil.rmtree(repository_dirs("modelscope", repository, self._root)[0] / _STAGING, ignore_errors=True)
        return directory

    def _remove_locks(self, repository: str, files: Sequence[RemoteFile]) -> None:
        """Remove the client's locks of a cancelled download, which a thread can still hold, and delay the next one."""
        from modelscope_hub import _download

        # Another version of the client can name its locks otherwise: then they are kept.
        with contextlib.suppress(AttributeError, TypeError, OSError):
            lock_path: Any = _download.DownloadManager._lock_path
            for file in files:
                path: Path = lock_path(None, repository, "model", cache_dir=self._root, file_path=file.path)
                path.unlink(missing_ok=True)
            remove_empty_parents(path.parent, self._root)

    def _older_directory(self, repository: str, files: Sequence[RemoteFile]) -> Path | None:
        """Return the directory in which an older client keeps this repository, if its files have the listed sizes."""
        for directory in older_modelscope_dirs(self._root, repository):
            present = [file for file in files if (directory / file.path).is_file()]
            if present and all((directory / file.path).stat().st_size == file.size for file in present):
                return directory
        return None

    # --- errors ---------------------------------------------------------------------------------------

    def _offline(self, repository: str, revision: str | None) -> OfflineError:
        snapshots = repository_dirs("modelscope", repository, self._root)[0] / "snapshots"
        candidates = [snapshots / each for each in ([revision] if revision else _DEFAULT_REVISIONS)]
        candidates += older_modelscope_dirs(self._root, repository)
        existing = next((path for path in candidates if (path / "config.json").is_file()), None)
        remedy = (
            f"EMB_PROVIDER_MODEL_PATH={existing}, which ModelScope's client left without hashes to check it against"
            if existing is not None
            else "EMB_PROVIDER_MODEL_PATH to a directory that contains the model"
        )
        return OfflineError(
            f"There is no verified snapshot of {repository} from ModelScope on this machine, and "
            f"EMB_PROVIDER_OFFLINE forbids downloading it. Start once without it, or set {remedy}."
        )

    def _translate(self, error: Exception, repository: str) -> HubError:
        from modelscope_hub import errors

        cause: BaseException = error
        if isinstance(cause, errors.FileDownloadError) and cause.failed_files:
            failed = list(cause.failed_files.values())
            # Of several errors, one of the disk is the one that the user can fix.
            cause = next((each for each in failed if isinstance(each, OSError) and each.errno), failed[0])
        state = self.classify(cause)
        credentials = "no token was sent"
        if self.token:
            is_stored = not self._config.token and not os.environ.get("MODELSCOPE_API_TOKEN")
            stored = f"that `modelscope login` stored in {self._client_config.credentials_dir} " if is_stored else ""
            credentials = f"the token {stored}was rejected"
        if state == "lacks":
            return RepositoryNotFoundError(
                f"ModelScope has no repository {repository}, or it is private ({credentials}). Check the "
                "name, or set EMB_PROVIDER_MODELSCOPE_TOKEN."
            )
        if state == "refuses":
            status = getattr(cause, "status_code", None)
            return AccessDeniedError(
                f"{repository} on ModelScope is not accessible: {credentials} (HTTP {status}). Set "
                "EMB_PROVIDER_MODELSCOPE_TOKEN to a token that can read it."
            )
        reason = first_line(cause, secret=self.token)
        if isinstance(cause, errors.FileIntegrityError):
            return CorruptSnapshotError(
                f"A file of {repository} was downloaded with other bytes than ModelScope lists each time, and was "
                f"removed ({reason}). Try again later."
            )
        if isinstance(cause, OSError) and (known := translate_os_error(cause, self._root, _CACHE_SETTING)):
            return known
        advice = advice_about(cause) or (
            "Check the network and EMB_PROVIDER_MODELSCOPE_ENDPOINT, try again later, or take the model from Hugging Face: "
            "`--source huggingface`, or EMB_PROVIDER_MODEL_SOURCE=huggingface."
        )
        return HubUnavailableError(
            f"ModelScope could not be reached for {repository} ({type(cause).__name__}: {reason}). {advice}"
        )


@dataclass(frozen=True, slots=True)
class StagedUpdate:
    """A newer state of a branch, which is downloaded next to the snapshot and then takes its place."""

    repository: str
    directory: Path
    """Of the snapshot."""
    staging: Path
    """Where the changed files are downloaded to first."""
    changed: frozenset[str]
    """Files that are new or have other bytes now."""
    manifests: Sequence[Path]
    """The manifests of the snapshot that name changed files."""
    locks: SnapshotLocks

    def require_unused(self) -> None:
        """Raise ModelInUseError if a process uses the snapshot."""
        if self.locks.is_held(self.directory):
            raise ModelInUseError(
                f"{self.repository} is in use, and ModelScope has a newer state of it: nothing was replaced. Unload "
                f"it first (`emb-provider unload {self.repository}`), or end the process that uses it; then download "
                "it again."
            )

    def commit(self) -> None:
        """Replace the changed files by the downloaded ones. The caller holds the repository's lock."""
        # Order matters: remove the manifests first, so that no new reader can start, then check for existing readers.
        manifests = {path: path.read_bytes() for path in self.manifests if path.exists()}
        for path in manifests:
            path.unlink()
        try:
            self.require_unused()
        except ModelInUseError:
            for path, content in manifests.items():
                write_atomically(path, content)
            raise
        for name in sorted(self.changed):
            target = self.directory / name
            target.parent.mkdir(parents=True, exist_ok=True)
            (self.staging / name).replace(target)


def find_update(
    config: HubConfig, repository: str, revision: str, files: Sequence[RemoteFile], root: Path
) -> StagedUpdate | None:
    """Return the update of a snapshot in a cache to the files that the hub lists, or None if nothing is to be replaced.

    Files that were only damaged on disk have an unchanged hash on the hub and are not included.
    """
    repository_dir, *older = repository_dirs("modelscope", repository, root)
    directories = {repository_dir / "snapshots" / revision, *older}
    present = [
        (key, found.snapshot)
        for key, found in manifest.load_all(config.manifest_dir)
        if (key.hub, key.repository) == ("modelscope", repository)
        and found.snapshot.path in directories
        and found.snapshot.revision == revision
    ]
    known = {file.path: file.sha256 for _, snapshot in present for file in snapshot.files}
    replaced = {file.path for file in files if file.sha256 and known.get(file.path, file.sha256) != file.sha256}
    if not replaced:
        return None
    added = {file.path for file in files} - known.keys()
    return StagedUpdate(
        repository=repository,
        directory=present[0][1].path,
        staging=repository_dir / _STAGING,
        changed=frozenset(replaced | added),
        manifests=[
            key.manifest_path(config.manifest_dir)
            for key, snapshot in present
            if any(file.path in replaced for file in snapshot.files)
        ],
        locks=SnapshotLocks(config.manifest_dir.parent),
    )


def _pause_after(error: BaseException) -> float | None:
    """Return None, because the client itself repeats requests; 0 for a dropped connection, after which it does not."""
    from modelscope_hub import errors

    return 0.0 if isinstance(error, errors.NetworkError) and "Connection aborted" in str(error) else None


def _reject(repository: str, directory: Path, file: RemoteFile) -> NoReturn:
    """Reject a file. The client has checked those that it downloaded, but not every listing has hashes."""
    (directory / file.path).unlink(missing_ok=True)
    raise CorruptSnapshotError(
        f"{file.path} of {repository} has other bytes than ModelScope lists, and was removed. Start again to download it."
    )
