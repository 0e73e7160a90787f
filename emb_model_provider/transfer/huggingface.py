"""Repositories on Hugging Face, through its own client.

Files are read over plain HTTP, also those that the hub keeps in Xet storage. They are uploaded with the LFS protocol,
because the client uploads to Xet storage only what is a file on disk or in memory as a whole.
"""

from __future__ import annotations

import io
import logging
import threading
from contextlib import contextmanager
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from emb_model_provider.errors import (
    AccessDeniedError,
    HubUnavailableError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    TransferError,
)
from emb_model_provider.formatting import printable
from emb_model_provider.hubs.huggingface import redirect_logs
from emb_model_provider.hubs.transfer import RemoteFile
from emb_model_provider.transfer import card
from emb_model_provider.transfer.repository import Failure, RepositoryInfo, reason_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import BinaryIO

    from huggingface_hub import CommitOperationAdd, HfApi

    from emb_model_provider.settings import HubSettings
    from emb_model_provider.transfer.location import Location
    from emb_model_provider.transfer.repository import Addition

_BLOCK_BYTES = 1 << 20
_SAMPLE_BYTES = 512
_TEMPORARY = frozenset({408, 425, 429, 500, 502, 503, 504})
_READ_TIMEOUT_S = 60.0


class HuggingFaceRepository:
    """A repository on Hugging Face. Commits go to its branch `main`."""

    branch = "main"
    max_inline_bytes = 10 * 1024 * 1024
    """The hub keeps larger files in LFS, whatever they contain."""

    def __init__(self, location: Location, settings: HubSettings) -> None:
        self._name = location.name
        self._requested = location.revision
        self._settings = settings
        self._uploaded: dict[str, CommitOperationAdd] = {}
        """Uploaded files that are not committed yet, by path."""
        self._lock = threading.Lock()

    # --- reading --------------------------------------------------------------------------------------

    def describe(self) -> RepositoryInfo | None:
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        try:
            info = self._api.model_info(self._name, revision=self._requested)
        except GatedRepoError:
            raise
        except RepositoryNotFoundError as error:
            # Without a valid token, the hub answers 401 for a repository that does not exist.
            if error.response.status_code == 401 and self._token is not None:
                raise
            return None
        declared: Any = getattr(info.card_data, "license", None)
        if declared is None:
            tags = (tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:"))
            declared = next(tags, None)
        if isinstance(declared, list):
            declared = next(iter(declared), None)
        return RepositoryInfo(
            revision=str(info.sha or self._requested or "main"),
            private=bool(info.private),
            gated=bool(info.gated),
            license=card.license_of(declared, getattr(info.card_data, "license_name", None)),
        )

    def list_files(self, revision: str) -> Mapping[str, RemoteFile]:
        from huggingface_hub import RepoFile

        files: dict[str, RemoteFile] = {}
        for entry in self._api.list_repo_tree(self._name, recursive=True, revision=revision):
            if isinstance(entry, RepoFile):
                sha256 = entry.lfs.sha256 if entry.lfs else None  # listed for large files only
                git_sha1 = str(entry.blob_id) if sha256 is None else None
                files[entry.path] = RemoteFile(entry.path, entry.size, sha256, git_sha1)
        return files

    def read(self, path: str, revision: str, start: int = 0) -> Iterator[bytes]:
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        url = hf_hub_url(self._name, path, revision=revision, endpoint=self._api.endpoint)
        # Compressed bytes would have another offset.
        headers = build_hf_headers(token=self._api.token) | {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
        # The client follows the redirect to the storage host, and sends the token only to the hub.
        with get_session().stream("GET", url, headers=headers, timeout=_READ_TIMEOUT_S) as response:
            if response.is_error:
                response.read()
            hf_raise_for_status(response)
            skip = start if start and response.status_code != 206 else 0
            for block in response.iter_raw(_BLOCK_BYTES):
                if skip < len(block):
                    yield block[skip:]
                skip = max(0, skip - len(block))

    def is_inline(self, path: str, size: int) -> bool:
        name = PurePosixPath(path).name
        return size <= self.max_inline_bytes or name in (card.README, "config.json", card.CONFIGURATION)

    # --- writing --------------------------------------------------------------------------------------

    def require_login(self) -> None:
        self._api.whoami()

    def create(self, *, private: bool, license_id: str | None) -> None:  # noqa: ARG002 - it is in README.md here
        self._api.create_repo(self._name, private=private, exist_ok=True)

    def find_missing(self, files: Sequence[RemoteFile]) -> frozenset[str]:
        """Return the sha256 of all files, because the hub says only before each upload whether it has a file."""
        return frozenset(file.sha256 for file in files if file.sha256 is not None)

    def upload(self, path: str, size: int, sha256: str, content: BinaryIO) -> bool:
        operation = _stream_operation(path, size, sha256, content)
        self._api.preupload_lfs_files(self._name, [operation], free_memory=False)
        is_sent = content.tell() > 0
        # Nothing reads the content after this, unless the hub wants the file within the commit.
        operation.path_or_fileobj = io.BytesIO(content.read() if operation._upload_mode == "regular" else b"")
        with self._lock:
            self._uploaded[path] = operation
        return is_sent

    def commit(self, additions: Sequence[Addition], message: str) -> None:
        from huggingface_hub import CommitOperationAdd

        operations = []
        for addition in additions:
            if addition.content is None:
                operations.append(self._uploaded[addition.path])
            else:
                # As a stream, because the client would upload bytes to Xet storage.
                operations.append(CommitOperationAdd(addition.path, io.BytesIO(addition.content)))
        self._api.create_commit(self._name, operations, commit_message=message, num_threads=1)

    # --- the client -----------------------------------------------------------------------------------

    @cached_property
    def _api(self) -> HfApi:
        redirect_logs()
        # It warns about each upload that does not use Xet.
        logging.getLogger("huggingface_hub._commit_api").setLevel(logging.ERROR)
        from huggingface_hub import HfApi

        return HfApi(endpoint=self._settings.endpoint("huggingface"), token=self._settings.token("huggingface"))

    @property
    def _token(self) -> str | None:
        from huggingface_hub import get_token

        return self._settings.token("huggingface") or get_token()

    def explain(self, error: Exception) -> Failure:
        import httpx2
        from huggingface_hub import errors

        where = f"{self._name} on Hugging Face ({self._api.endpoint})"
        cause: BaseException = error
        while isinstance(cause, RuntimeError) and isinstance(cause.__cause__, Exception):  # raised around an upload
            cause = cause.__cause__
        reason = reason_of(cause, self._token)
        if isinstance(cause, errors.RevisionNotFoundError):
            return Failure(RevisionNotFoundError(f"{where} has no branch, tag or commit {self._requested!r}."))
        if isinstance(cause, errors.EntryNotFoundError):
            return Failure(TransferError(f"{where}: a file that it lists does not exist ({reason}). Try again later."))
        if isinstance(cause, errors.HfHubHTTPError):
            return self._http_failure(cause, where, reason)
        if isinstance(cause, httpx2.HTTPError | OSError):
            message = (
                f"{where}: {type(cause).__name__}: {reason}. Check the network and HF_ENDPOINT, or try again later."
            )
            return Failure(HubUnavailableError(message), is_temporary=True)
        if isinstance(cause, ValueError) and "README.md" in reason:  # what the hub's check of the front matter found
            details = printable(" ".join(str(cause).split()))
            return Failure(
                TransferError(f"{where}: {details} Correct it at the source; for the license, add --license ID.")
            )
        return Failure(TransferError(f"{where}: {type(cause).__name__}: {reason}"))

    def _http_failure(self, error: Any, where: str, reason: str) -> Failure:
        from huggingface_hub.errors import GatedRepoError

        status = error.response.status_code
        problem = "the token was rejected or may not do this" if self._token else "no token was sent"
        if isinstance(error, GatedRepoError):
            return Failure(
                AccessDeniedError(
                    f"{where} is gated, and {problem}. Accept its terms on the web page, then set EMB_PROVIDER_HF_TOKEN, or "
                    "log in with `hf auth login`."
                )
            )
        if status in (401, 403):
            return Failure(
                AccessDeniedError(
                    f"{where}: access was refused (HTTP {status}), {problem}. Set EMB_PROVIDER_HF_TOKEN, or log in with "
                    "`hf auth login`; an upload needs a token with write permission."
                )
            )
        if status == 404:
            return Failure(RepositoryNotFoundError(f"{where} does not exist, or is private: {problem}."))
        if status in _TEMPORARY:
            after = error.response.headers.get("Retry-After", "")
            message = f"{where} answered HTTP {status}. Try again later."
            retry_after_s = float(after) if after.isdigit() else None
            return Failure(HubUnavailableError(message), is_temporary=True, retry_after_s=retry_after_s)
        return Failure(TransferError(f"{where} answered HTTP {status}: {reason}"))


def _stream_operation(path: str, size: int, sha256: str, content: BinaryIO) -> CommitOperationAdd:
    """Return an operation of the client that reads a stream only to upload it, because the hash is known."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    class StreamOperation(CommitOperationAdd):
        def __post_init__(self) -> None:
            sample = content.read(_SAMPLE_BYTES)
            content.seek(0)
            self.upload_info = UploadInfo(size=size, sample=sample, sha256=bytes.fromhex(sha256))

        @contextmanager
        def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:  # noqa: ARG002, FBT - the client's signature
            yield content

    return StreamOperation(path, content)
