"""Hugging Face, through its own client.

The client lists repositories, authenticates, follows redirects, resumes dropped connections and keeps a cache. It does
not hash files that it receives over plain HTTP, so they are hashed here and compared with the hub's listing.
"""

from __future__ import annotations

import logging
import os
import re
from functools import cached_property, partial
from pathlib import Path
from traceback import walk_tb
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
from emb_model_provider.formatting import first_line
from emb_model_provider.hubs.listing import bind_session, bounded_files, bounded_listing, require_size
from emb_model_provider.hubs.network import advice_about, ask, is_dropped, repeat, share_certificates
from emb_model_provider.hubs.selection import require_all_parts, select_files
from emb_model_provider.hubs.transfer import ByteCounter, FileCounter, RemoteFile, bar_class, run_all, verify_files
from emb_model_provider.progress import Progress
from emb_model_provider.snapshots.files import translate_os_error
from emb_model_provider.snapshots.snapshot import Snapshot

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from huggingface_hub import HfApi

    from emb_model_provider.hubs.base import HubConfig, HubState
    from emb_model_provider.progress import CancelToken, OnProgress
    from emb_model_provider.snapshots.snapshot import SnapshotFile

logger = logging.getLogger(__name__)

_CACHE_SETTING = "EMB_PROVIDER_HF_CACHE_DIR"
_NAME = "Hugging Face"
_TEMPORARY = frozenset({429, 500, 502, 503, 504})
_DEFAULT_REVISION = "main"
_COMMIT = re.compile(r"[0-9a-fA-F]{7,64}")
_THREADS = 4
"""Files downloaded in parallel, because many small ones wait for round trips while the large one waits for bytes."""
_MAX_REVISIONS_SHOWN = 10
_ELSEWHERE = (
    "set EMB_PROVIDER_HF_ENDPOINT to a mirror, or take the model from ModelScope: `--source modelscope`, or "
    "EMB_PROVIDER_MODEL_SOURCE=modelscope"
)


class HuggingFaceHub:
    """Downloads a repository at the commit that a branch or tag refers to now."""

    def __init__(self, config: HubConfig) -> None:
        redirect_logs()
        share_certificates()
        # Xet's client would be silent for minutes if its host cannot be reached.
        os.environ.setdefault("HF_XET_CLIENT_CONNECT_TIMEOUT", "10s")
        os.environ.setdefault("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "2")
        self._config = config

    def fetch(self, repository: str, revision: str | None, on_progress: OnProgress, cancel: CancelToken) -> Snapshot:
        """List the repository, download the files that serving needs and that are not cached, and hash them all."""
        requested = revision or _DEFAULT_REVISION
        if self._config.offline:
            return self._adopt(repository, requested, on_progress)
        on_progress(Progress("resolve", repository))
        check = cancel.raise_if_cancelled
        try:
            commit = ask(_NAME, lambda: self._commit_of(repository, requested), check, _pause_after)
            files = ask(_NAME, lambda: self._list(repository, commit, requested), check, _pause_after)
            directory = self._download(repository, commit, files, on_progress, cancel)
            replace = partial(self._download_again, repository, commit, directory, on_progress, cancel)
            verified = verify_files(repository, directory, files, replace, on_progress)
        except (HubError, OperationCancelledError):
            raise
        except Exception as error:  # the client raises errors of five libraries
            raise self._translate(error, repository, requested) from error
        if not self._config.patterns:
            origin = f"Repository {repository}@{requested} on Hugging Face"
            require_all_parts(directory, (file.path for file in verified), origin)
        return Snapshot.of("huggingface", repository, commit, directory, verified)

    # --- connectivity ---------------------------------------------------------------------------------

    @property
    def endpoint(self) -> str:
        return self._api.endpoint

    @property
    def token(self) -> str | None:
        from huggingface_hub import get_token

        return self._config.token or get_token()

    def check_token(self) -> None:
        self._api.whoami()

    def check_repository(self, repository: str, timeout_s: float) -> None:
        self._api.model_info(repository, revision=_DEFAULT_REVISION, timeout=timeout_s)

    def classify(self, error: BaseException) -> HubState:
        from huggingface_hub import errors

        if not isinstance(error, errors.HfHubHTTPError):
            return "silent"
        status = error.response.status_code
        if isinstance(error, errors.GatedRepoError):
            return "refuses"
        # Without a token, the hub answers 401 for a repository that does not exist.
        if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
            return "lacks"
        return "refuses" if status in (401, 403) else "fails"

    # --- downloading ----------------------------------------------------------------------------------

    @cached_property
    def _api(self) -> HfApi:
        from huggingface_hub import HfApi, get_session

        bind_session(get_session())
        return HfApi(endpoint=self._config.endpoint, token=self._config.token)

    def _commit_of(self, repository: str, revision: str) -> str:
        with bounded_listing():
            commit = self._api.model_info(repository, revision=revision).sha
        if commit is None or not _COMMIT.fullmatch(commit):  # it becomes a part of a path
            raise HubUnavailableError(
                f"Hugging Face returned no valid commit for {repository}@{revision}. Check EMB_PROVIDER_HF_ENDPOINT."
            )
        return commit

    def _list(self, repository: str, commit: str, revision: str) -> list[RemoteFile]:
        with bounded_listing():
            tree = self._api.list_repo_tree(repository, recursive=True, revision=commit)
            return self._select(bounded_files(tree), repository, revision)

    def _select(self, tree: Iterable[Any], repository: str, revision: str) -> list[RemoteFile]:
        """Return the files of a listing that serving needs, or those of them that were requested."""
        from huggingface_hub import RepoFile

        files: dict[str, RemoteFile] = {}
        for entry in tree:
            if isinstance(entry, RepoFile):
                sha256 = entry.lfs.sha256 if entry.lfs else None  # listed for large files only
                git_sha1 = str(entry.blob_id) if sha256 is None else None
                size = require_size(entry.path, entry.size)
                files[entry.path] = RemoteFile(entry.path, size, sha256, git_sha1)
        origin = f"Repository {repository}@{revision} on Hugging Face"
        return [files[path] for path in select_files(files, self._config.patterns, repository, origin)]

    def _download(
        self, repository: str, commit: str, files: Sequence[RemoteFile], on_progress: OnProgress, cancel: CancelToken
    ) -> Path:
        """Download files and return the directory of the snapshot."""
        total = sum(file.size for file in files)
        on_progress(Progress("download", repository, 0, total))
        counter = ByteCounter(repository, total, on_progress, cancel)
        tasks = [partial(self._get, repository, commit, file, counter) for file in files]
        paths = run_all(tasks, counter, threads=_THREADS)
        return _directory_of(paths[0], files[0].path)

    def _download_again(
        self,
        repository: str,
        commit: str,
        directory: Path,
        on_progress: OnProgress,
        cancel: CancelToken,
        file: RemoteFile,
    ) -> SnapshotFile:
        logger.warning("%s of %s has wrong bytes; downloading it again.", file.path, repository)
        _remove(directory / file.path)
        self._get(repository, commit, file, ByteCounter(repository, file.size, on_progress, cancel))
        verified = file.verify(directory)
        if verified is None:
            _remove(directory / file.path)
            raise CorruptSnapshotError(
                f"{file.path} of {repository} was downloaded twice, each time with other bytes than Hugging Face "
                "lists, and was removed. Try again later, or set EMB_PROVIDER_HF_ENDPOINT to another mirror."
            )
        return verified

    def _get(self, repository: str, revision: str, file: RemoteFile, counter: ByteCounter | None) -> Path:
        """Download a file, or without a counter only look for it in the cache."""
        from huggingface_hub import constants, hf_hub_download

        def get(counter: FileCounter | None) -> Path:
            return Path(
                hf_hub_download(
                    repository,
                    file.path,
                    revision=revision,
                    cache_dir=self._config.cache_dir,
                    endpoint=self._config.endpoint,
                    token=self._config.token,
                    tqdm_class=bar_class(counter) if counter is not None else None,
                    local_files_only=counter is None,
                )
            )

        if counter is None:
            return get(None)
        of_file = counter.of(file.path, file.size)

        def download() -> Path:
            of_file.restart()
            try:
                return get(of_file)
            except Exception as error:
                if constants.HF_HUB_DISABLE_XET or not _is_of_xet(error):
                    raise
                logger.warning(
                    "Xet, the storage of Hugging Face, cannot be reached for %s (%s): downloading without it. To allow it, "
                    "open *.xethub.hf.co in the firewall or the proxy; to skip it, set HF_HUB_DISABLE_XET=1.",
                    repository, first_line(error, secret=self.token),
                )  # fmt: skip
                constants.HF_HUB_DISABLE_XET = True
                of_file.restart()
                return get(of_file)

        return repeat(_NAME, download, lambda: counter.add(0), _pause_after)

    def _adopt(self, repository: str, revision: str, on_progress: OnProgress) -> Snapshot:
        """Return a snapshot from the client's own cache, if the client kept the listing to check it against."""
        try:
            # Imported here, because clients that do not keep listings have no such function, and nothing to adopt.
            from huggingface_hub import get_cached_repo_tree

            tree = get_cached_repo_tree(repository, revision=revision, cache_dir=self._config.cache_dir)
            files = self._select(tree, repository, revision)
            paths = [self._get(repository, revision, file, None) for file in files]
            directory = _directory_of(paths[0], files[0].path)
            verified = verify_files(repository, directory, files, partial(_reject, repository, directory), on_progress)
        except (HubError, OperationCancelledError):
            raise
        except Exception as error:
            raise OfflineError(
                f"There is no verified snapshot of {repository}@{revision} from Hugging Face on this machine, and "
                "EMB_PROVIDER_OFFLINE forbids downloading it. Start once without it, or set "
                "EMB_PROVIDER_MODEL_PATH to a directory that contains the model."
            ) from error
        if not self._config.patterns:
            origin = f"The cached {repository}@{revision}"
            require_all_parts(directory, (file.path for file in verified), origin)
        return Snapshot.of("huggingface", repository, directory.name, directory, verified)

    # --- errors ---------------------------------------------------------------------------------------

    def _translate(self, error: Exception, repository: str, revision: str) -> HubError:
        from huggingface_hub import errors

        cause: BaseException = error
        # LocalEntryNotFoundError only says that a request failed and the cache does not have the file either.
        while isinstance(cause, errors.LocalEntryNotFoundError) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return OfflineError(
                f"{repository} is not on this machine, and HF_HUB_OFFLINE forbids downloading it. Unset it once."
            )
        if isinstance(cause, errors.RevisionNotFoundError):
            return RevisionNotFoundError(
                f"{repository} on Hugging Face has no branch, tag or commit {revision!r}; it has "
                f"{self._revisions(repository)}. Name one of them: `--revision`, or EMB_PROVIDER_MODEL_REVISION."
            )
        if isinstance(cause, errors.HFValidationError):
            return RepositoryNotFoundError(
                f"{repository!r} is not a valid repository id on Hugging Face (owner/name). Check the name."
            )
        if isinstance(cause, errors.HfHubHTTPError):
            return self._http_error(cause, repository)
        if isinstance(cause, OSError):
            directory = self._config.cache_dir or "the Hugging Face cache"
            if (known := translate_os_error(cause, directory, _CACHE_SETTING)) is not None:
                return known
            if "Consistency check failed" in str(cause):
                return CorruptSnapshotError(
                    f"A file of {repository} was downloaded with another size than Hugging Face lists. Try again "
                    "later, or set EMB_PROVIDER_HF_ENDPOINT to another mirror."
                )
        reason = f"{type(cause).__name__}: {first_line(cause, secret=self.token)}"
        advice = advice_about(cause) or f"Check the network, {_ELSEWHERE}."
        return HubUnavailableError(f"Hugging Face could not be reached for {repository} ({reason}). {advice}")

    def _http_error(self, error: Any, repository: str) -> HubError:
        from huggingface_hub.errors import DisabledRepoError, GatedRepoError

        status = error.response.status_code
        asked_s = _pause_after(error) or 0.0
        state = self.classify(error)
        credentials = self._credentials
        if isinstance(error, GatedRepoError):
            return AccessDeniedError(
                f"{repository} on Hugging Face is gated, and {credentials}. Accept its terms on the web page, "
                "then set EMB_PROVIDER_HF_TOKEN."
            )
        is_named = error.response.headers.get("X-Error-Code") == "RepoNotFound"
        if state == "lacks" and (status == 404 or is_named):
            return RepositoryNotFoundError(
                f"Hugging Face has no repository {repository}, or it is private ({credentials}). Check the "
                "name, or set EMB_PROVIDER_HF_TOKEN."
            )
        if state in ("lacks", "refuses"):
            problem = "is disabled" if isinstance(error, DisabledRepoError) else f"is not accessible: {credentials}"
            return AccessDeniedError(
                f"{repository} on Hugging Face {problem} (HTTP {status}). Set EMB_PROVIDER_HF_TOKEN to a token "
                "that can read it."
            )
        when = f"in {asked_s:.0f} s" if asked_s else "later"
        return HubUnavailableError(
            f"Hugging Face answered HTTP {status} for {repository}. Try again {when}, {_ELSEWHERE}."
        )

    @property
    def _credentials(self) -> str:
        """What is known about the token that was sent, for messages."""
        from huggingface_hub import constants

        if self._config.token or os.environ.get("HF_TOKEN"):
            return "the token was rejected"
        if self.token:
            return f"the token that `hf auth login` stored in {constants.HF_TOKEN_PATH} was rejected"
        return "no token was sent"

    def search(self, text: str, limit: int) -> list[str]:
        return [found.id for found in self._api.list_models(search=text, sort="downloads", limit=limit)]

    def _revisions(self, repository: str) -> str:
        try:
            refs = self._api.list_repo_refs(repository)
        except Exception as error:  # noqa: BLE001 - only a hint in the message of another error
            logger.debug("Could not list the revisions of %s: %s", repository, type(error).__name__)
            return "others"
        names = [ref.name for ref in (*refs.branches, *refs.tags)]
        return ", ".join(names[:_MAX_REVISIONS_SHOWN]) or "none"


def redirect_logs() -> None:
    """Let the client's log lines go to the handlers of the service, and only there."""
    import huggingface_hub.utils.logging  # noqa: F401 - the import adds the client's handler

    logger = logging.getLogger("huggingface_hub")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
    logger.propagate = True


def _pause_after(error: BaseException) -> float | None:
    """Return how long the hub asks to wait before a request is repeated; None if it would fail again."""
    from huggingface_hub import errors

    cause = error
    while isinstance(cause, errors.LocalEntryNotFoundError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if not isinstance(cause, errors.HfHubHTTPError):
        return 0.0 if is_dropped(cause) else None
    if cause.response.status_code not in _TEMPORARY:
        return None
    text = cause.response.headers.get("retry-after", "")
    return float(text[:9]) if text.isdecimal() else 0.0


def _is_of_xet(error: BaseException) -> bool:
    """Return whether an error comes from the storage Xet, whose client has its own network library and no own errors."""
    return any(frame.f_code.co_name == "xet_get" for frame, _ in walk_tb(error.__traceback__))


def _reject(repository: str, directory: Path, file: RemoteFile) -> NoReturn:
    raise CorruptSnapshotError(
        f"{file.path} of {repository} in the cache ({directory}) has wrong bytes, and "
        "EMB_PROVIDER_OFFLINE forbids downloading it again. Start once without it."
    )


def _directory_of(file: Path, path: str) -> Path:
    """Return the directory of a snapshot, from one of its files and the path of that file in the repository."""
    return file.parents[path.count("/")]


def _remove(path: Path) -> None:
    """Remove a file from a snapshot, and the blob that it links to."""
    while path.is_symlink():
        target = path.parent / path.readlink()
        path.unlink()
        path = target
    path.unlink(missing_ok=True)
