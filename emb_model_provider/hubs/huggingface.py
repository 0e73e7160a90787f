"""Hugging Face, through its own client.

The client lists, authenticates, follows redirects, resumes a dropped connection and keeps its cache. It
does not hash what comes over plain HTTP, so that is done here, against what the listing announces.
"""

from __future__ import annotations

import functools
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from emb_model_provider.errors import (
    AccessDeniedError,
    CorruptSnapshotError,
    HubError,
    HubUnavailableError,
    OfflineError,
    OperationCancelledError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from emb_model_provider.hubs.selection import require_all_parts, select_files
from emb_model_provider.hubs.transfer import ByteCounter, bar_class, wait_all
from emb_model_provider.progress import Progress
from emb_model_provider.snapshots.files import translate_os_error
from emb_model_provider.snapshots.snapshot import Snapshot, SnapshotFile, hash_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from huggingface_hub import HfApi

    from emb_model_provider.hubs.base import HubConfig
    from emb_model_provider.progress import CancelToken, OnProgress


log = logging.getLogger(__name__)

_DEFAULT_REVISION = "main"
_COMMIT = re.compile(r"[0-9a-fA-F]{7,64}")
_WORKERS = 4
"""Files fetched side by side: the many small ones wait for round trips, the large one for bytes."""


@dataclass(frozen=True, slots=True)
class _Listed:
    """A file as the hub announces it."""

    path: str
    size: int
    sha256: str | None
    """Announced for large files only."""
    git_sha1: str

    def check(self, directory: Path) -> SnapshotFile | None:
        """Read the file and return it, or None where its bytes are not the announced ones."""
        hashes = hash_file(directory / self.path, git=self.sha256 is None)
        same_bytes = hashes.git_sha1 == self.git_sha1 if self.sha256 is None else hashes.sha256 == self.sha256
        if hashes.size != self.size or not same_bytes:
            return None
        return SnapshotFile(self.path, hashes.size, hashes.sha256)


class HuggingFaceHub:
    """Fetches a repository at the commit that a branch or tag stands for now."""

    def __init__(self, config: HubConfig) -> None:
        self._config = config

    def fetch(
        self, repository: str, revision: str | None, on_progress: OnProgress, cancel: CancelToken
    ) -> Snapshot:
        """List the repository, fetch what serving needs and is not cached, and hash all of it."""
        _quiet()
        if self._config.offline:
            return self._adopt(repository, revision, on_progress, cancel)
        from huggingface_hub import HfApi

        asked = revision or _DEFAULT_REVISION
        on_progress(Progress("resolve", repository))
        api = HfApi(endpoint=self._config.endpoint, token=self._config.token)
        try:
            commit = _commit_of(api, repository, asked)
            tree = list(api.list_repo_tree(repository, recursive=True, revision=commit))
            listing = self._selected(tree, repository, asked)
            directory = self._download(repository, commit, listing, on_progress, cancel)
            again = functools.partial(self._again, repository, commit, directory)
            files = _verify(repository, directory, listing, on_progress, cancel, again)
        except (HubError, OperationCancelledError):
            raise
        except Exception as error:  # noqa: BLE001 (the client raises from five libraries; all are translated)
            raise_translated(error, repository, asked, self._config, lambda: _revisions(api, repository))
        if not self._config.partial:
            where = f"Repository {repository}@{asked} on Hugging Face"
            require_all_parts(directory, (file.path for file in files), where)
        return Snapshot.of("huggingface", repository, commit, directory, files)

    def _selected(self, tree: Iterable[Any], repository: str, revision: str) -> list[_Listed]:
        """The files of a listing that serving needs, or those of them that were asked for."""
        from huggingface_hub import RepoFile

        listing = {
            entry.path: _Listed(
                entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id
            )
            for entry in tree
            if isinstance(entry, RepoFile)
        }
        where = f"Repository {repository}@{revision} on Hugging Face"
        return [listing[path] for path in select_files(listing, self._config, repository, where)]

    def _download(
        self,
        repository: str,
        commit: str,
        listing: list[_Listed],
        on_progress: OnProgress,
        cancel: CancelToken,
    ) -> Path:
        """Let the client bring the files, and return the directory it put them in."""
        total = sum(file.size for file in listing)
        on_progress(Progress("download", repository, 0, total))
        counter = ByteCounter(repository, total, on_progress, cancel)
        bar = bar_class(counter)
        pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="huggingface")
        abandon = False
        try:
            found = wait_all(
                [pool.submit(self._get, repository, commit, file.path, bar) for file in listing], cancel
            )
        except (OperationCancelledError, KeyboardInterrupt):
            abandon = True
            raise
        finally:
            pool.shutdown(wait=not abandon, cancel_futures=True)
        return _directory_of(found[0], listing[0].path)

    def _get(self, repository: str, commit: str, path: str, bar: Any, *, local: bool = False) -> Path:
        from huggingface_hub import hf_hub_download

        return Path(
            hf_hub_download(
                repository,
                path,
                revision=commit,
                cache_dir=self._config.cache_dir,
                endpoint=self._config.endpoint,
                token=self._config.token,
                tqdm_class=bar,
                local_files_only=local,
            )
        )

    def _again(self, repository: str, commit: str, directory: Path, file: _Listed) -> SnapshotFile:
        """Remove a file that has wrong bytes, and fetch it once more."""
        log.warning("%s of %s arrived with wrong bytes; fetching it again.", file.path, repository)
        _remove(directory / file.path)
        self._get(repository, commit, file.path, bar_class(None))
        checked = file.check(directory)
        if checked is None:
            _remove(directory / file.path)
            raise CorruptSnapshotError(
                f"{file.path} of {repository} arrived twice with other bytes than Hugging Face announces, "
                "and was removed. Try again later, or another mirror: EMB_PROVIDER_HF_ENDPOINT."
            )
        return checked

    def _adopt(
        self, repository: str, revision: str | None, on_progress: OnProgress, cancel: CancelToken
    ) -> Snapshot:
        """Take over what the client's own cache holds, where its listing lets every file be checked."""
        asked = revision or _DEFAULT_REVISION
        try:
            # Imported in here: a client too old to keep listings has no such function, and nothing to adopt.
            from huggingface_hub import get_cached_repo_tree

            tree = get_cached_repo_tree(repository, revision=asked, cache_dir=self._config.cache_dir)
            listing = self._selected(tree, repository, asked)
            found = [self._get(repository, asked, file.path, bar_class(None), local=True) for file in listing]
            directory = _directory_of(found[0], listing[0].path)
            files = _verify(
                repository, directory, listing, on_progress, cancel, _refuse(repository, directory)
            )
        except (HubError, OperationCancelledError):
            raise
        except Exception as error:
            raise OfflineError(
                f"No verified snapshot of {repository}@{asked} from Hugging Face is on this machine, and "
                "EMB_PROVIDER_OFFLINE forbids fetching it. Start once without it, or set "
                "EMB_PROVIDER_MODEL_PATH to a directory that holds the model."
            ) from error
        if not self._config.partial:
            require_all_parts(directory, (file.path for file in files), f"The cached {repository}@{asked}")
        return Snapshot.of("huggingface", repository, directory.name, directory, files)


def _quiet() -> None:
    """Let the client's log lines go where the service's go, and only there."""
    import huggingface_hub.utils.logging  # noqa: F401 (it is what adds the handler)

    logger = logging.getLogger("huggingface_hub")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.propagate = True


def _commit_of(api: HfApi, repository: str, revision: str) -> str:
    commit = api.model_info(repository, revision=revision).sha
    if commit is None or not _COMMIT.fullmatch(commit):  # it becomes a part of a path
        raise HubUnavailableError(
            f"Hugging Face did not say which commit {repository}@{revision} is. Check EMB_PROVIDER_HF_ENDPOINT."
        )
    return commit


def _verify(
    repository: str,
    directory: Path,
    listing: list[_Listed],
    on_progress: OnProgress,
    cancel: CancelToken,
    on_wrong: Callable[[_Listed], SnapshotFile],
) -> list[SnapshotFile]:
    """Hash every file; `on_wrong` replaces one that has other bytes than announced, or raises."""
    done, total = 0, sum(file.size for file in listing)
    files: list[SnapshotFile] = []
    for file in listing:
        cancel.raise_if_cancelled()
        checked = file.check(directory) or on_wrong(file)
        files.append(checked)
        done += checked.size
        on_progress(Progress("verify", repository, done, total))
    return files


def _refuse(repository: str, directory: Path) -> Callable[[_Listed], NoReturn]:
    def refuse(file: _Listed) -> NoReturn:
        raise CorruptSnapshotError(
            f"{file.path} of {repository} in the cache ({directory}) has wrong bytes, and "
            "EMB_PROVIDER_OFFLINE forbids fetching it again. Start once without it."
        )

    return refuse


def _directory_of(file: Path, path: str) -> Path:
    """The snapshot's directory, from where one of its files lies."""
    return file.parents[path.count("/")]


def _remove(path: Path) -> None:
    """Remove a file from the snapshot and from the store of blobs that it links to."""
    while path.is_symlink():
        target = path.parent / path.readlink()
        path.unlink()
        path = target
    path.unlink(missing_ok=True)


def _revisions(api: HfApi, repository: str) -> str:
    try:
        refs = api.list_repo_refs(repository)
    except Exception as error:  # noqa: BLE001 (a hint inside another error's message; without it is fine)
        log.debug("Could not list the revisions of %s: %s", repository, type(error).__name__)
        return "others"
    return ", ".join([ref.name for ref in (*refs.branches, *refs.tags)][:10]) or "none"


_CACHE_SETTING = "EMB_PROVIDER_HF_CACHE_DIR"


def raise_translated(
    error: Exception, repository: str, revision: str, config: HubConfig, revisions: Callable[[], str]
) -> NoReturn:
    """Raise the client's error in our words; `revisions` is asked for those that there are."""
    from huggingface_hub import errors

    cause: BaseException = error
    # "cannot find it in the cache" only says that the request before it failed; that one is the reason.
    while isinstance(cause, errors.LocalEntryNotFoundError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, errors.OfflineModeIsEnabled):
        raise OfflineError(
            f"{repository} is not on this machine, and HF_HUB_OFFLINE forbids fetching it. Unset it once."
        ) from error
    if isinstance(cause, errors.RevisionNotFoundError):
        raise RevisionNotFoundError(
            f"{repository} on Hugging Face has no branch, tag or commit {revision!r}; it has "
            f"{revisions()}. Set EMB_PROVIDER_MODEL_REVISION to one of them."
        ) from error
    if isinstance(cause, errors.HfHubHTTPError):
        raise _http_error(cause, repository, config) from error
    if isinstance(cause, errors.HFValidationError):
        raise RepositoryNotFoundError(
            f"{repository!r} cannot be a repository on Hugging Face (owner/name). "
            "Check EMB_PROVIDER_MODEL_NAME."
        ) from error
    if isinstance(cause, OSError):
        refused = translate_os_error(cause, config.cache_dir or "the Hugging Face cache", _CACHE_SETTING)
        if refused is not None:
            raise refused from error
    if isinstance(cause, OSError) and "Consistency check failed" in str(cause):
        raise CorruptSnapshotError(
            f"A file of {repository} arrived with another size than Hugging Face announces. Try again "
            "later, or another mirror: EMB_PROVIDER_HF_ENDPOINT."
        ) from error
    raise HubUnavailableError(
        f"Hugging Face could not be reached for {repository} ({type(cause).__name__}: {_line(cause, config)}). "
        "Check the network, or set EMB_PROVIDER_HF_ENDPOINT to a mirror."
    ) from error


def _http_error(error: Any, repository: str, config: HubConfig) -> HubError:
    from huggingface_hub.errors import DisabledRepoError, GatedRepoError

    status = error.response.status_code
    code = error.response.headers.get("X-Error-Code")
    given = "the token was refused" if config.token else "no token was given"
    if isinstance(error, GatedRepoError):
        return AccessDeniedError(
            f"{repository} on Hugging Face is gated, and {given} for it. Accept its terms on the web page, "
            "then set EMB_PROVIDER_HF_TOKEN."
        )
    if status == 404 or code == "RepoNotFound":
        return RepositoryNotFoundError(
            f"Hugging Face has no repository {repository}, or it is private ({given}). Check "
            "EMB_PROVIDER_MODEL_NAME, or set EMB_PROVIDER_HF_TOKEN."
        )
    if status in {401, 403}:
        what = "is disabled" if isinstance(error, DisabledRepoError) else f"is not open to us: {given}"
        return AccessDeniedError(
            f"{repository} on Hugging Face {what} (HTTP {status}). Set EMB_PROVIDER_HF_TOKEN to a token "
            "that may read it."
        )
    return HubUnavailableError(
        f"Hugging Face answered HTTP {status} for {repository}. Try again later, or set "
        "EMB_PROVIDER_HF_ENDPOINT to a mirror."
    )


def _line(error: BaseException, config: HubConfig) -> str:
    """An error's first line, without the token."""
    line = next(iter(str(error).strip().splitlines()), "")[:200]
    return line.replace(config.token, "***") if config.token else line
