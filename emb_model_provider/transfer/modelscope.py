"""Repositories on ModelScope, through its own client.

`HubApi.legacy` is the part of the client that uploads single blobs and creates commits. It is not documented, so the
version of the client is pinned, and a test uses every method that is called here.
"""

from __future__ import annotations

import base64
import logging
import secrets
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
from emb_model_provider.hubs.transfer import RemoteFile
from emb_model_provider.transfer import card
from emb_model_provider.transfer.repository import Failure, RepositoryInfo, reason_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import BinaryIO

    from modelscope_hub import HubApi, HubConfig

    from emb_model_provider.settings import HubSettings
    from emb_model_provider.transfer.location import Location
    from emb_model_provider.transfer.repository import Addition

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 1 << 20
_DEFAULT_REVISIONS = ("master", "main")
_BLOBS_PER_REQUEST = 63
"""One less than the client sends, because a probe is added."""
_MAX_REVISIONS_SHOWN = 10
_PUBLIC = 5
"""The client's number of the visibility; 3 is visible to the members of an organization."""
_CONFLICTS = ("branch changed", "could not update refs", "please retry", "try again")
"""In the message of a commit that another commit overtook."""


class ModelScopeRepository:
    """A repository on ModelScope. Commits go to its branch `master`."""

    branch = "master"
    max_inline_bytes = 64 * 1024

    def __init__(self, location: Location, settings: HubSettings) -> None:
        self._name = location.name
        self._requested = location.revision
        self._settings = settings

    # --- reading --------------------------------------------------------------------------------------

    def describe(self) -> RepositoryInfo | None:
        from modelscope_hub.errors import NotExistError

        try:
            info = self._api.get_repo(self._name, "model")
        except NotExistError:
            return None
        return RepositoryInfo(
            revision=self._resolve(),
            private=info.visibility is not None and int(info.visibility) != _PUBLIC,
            gated=bool(info.gated),
            license=card.license_of(info.license, None),
        )

    def list_files(self, revision: str) -> Mapping[str, RemoteFile]:
        entries = self._api.list_repo_files(self._name, "model", revision=revision)
        return {
            entry.path: RemoteFile(
                entry.path,
                entry.size,
                entry.sha256.lower() if entry.sha256 else None,
                entry.blob_id if entry.blob_id and not entry.sha256 else None,
            )
            for entry in entries
            if not entry.is_dir
        }

    def read(self, path: str, revision: str, start: int = 0) -> Iterator[bytes]:
        headers = {"Range": f"bytes={start}-"} if start else None
        response = self._api.legacy.download_stream(self._name, "model", path, revision, headers)
        with response:
            skip = start if start and response.status_code != 206 else 0
            yield from _skip(response.iter_content(_BLOCK_BYTES), skip)

    def is_inline(self, path: str, size: int) -> bool:
        from modelscope_hub.constants import MODEL_LFS_SUFFIX, UPLOAD_INLINE_METADATA_PATHS

        file = PurePosixPath(path)
        if file.name.upper() in {name.upper() for name in UPLOAD_INLINE_METADATA_PATHS}:
            return True
        # An upload needs at least one byte.
        return size == 0 or (size <= self.max_inline_bytes and file.suffix.lower() not in MODEL_LFS_SUFFIX)

    # --- writing --------------------------------------------------------------------------------------

    def require_login(self) -> None:
        self._api.whoami()

    def create(self, *, private: bool, license_id: str | None) -> None:
        from modelscope_hub.errors import AlreadyExistsError

        if license_id is None:
            raise AssertionError("without a license, ModelScope labels the repository Apache-2.0")
        visibility = "private" if private else "public"
        try:
            self._api.create_repo(self._name, "model", visibility=visibility, license=license_id)
        except AlreadyExistsError:
            # The answer to an earlier attempt was lost. If it belongs to another user, the first upload is refused.
            logger.info("%s exists already.", self._name)

    def find_missing(self, files: Sequence[RemoteFile]) -> frozenset[str]:
        missing: set[str] = set()
        objects: list[Mapping[str, Any]] = [{"oid": file.sha256, "size": file.size} for file in files]
        for start in range(0, len(objects), _BLOBS_PER_REQUEST):
            some = objects[start : start + _BLOBS_PER_REQUEST]
            missing |= self._find_upload_urls(some).keys()
        return frozenset(missing)

    def upload(self, path: str, size: int, sha256: str, content: BinaryIO) -> bool:  # noqa: ARG002 - blobs have no path
        # Asked for each file, because the URLs expire.
        url = self._find_upload_urls([{"oid": sha256, "size": size}]).get(sha256)
        if url is None:
            return False
        self._api.legacy.upload_blob(url, content, size)
        return True

    def commit(self, additions: Sequence[Addition], message: str) -> None:
        operations = [_operation(addition) for addition in additions]
        self._api.legacy.create_commit(self._name, "model", operations, message, revision=self.branch)

    def _find_upload_urls(self, objects: Sequence[Mapping[str, Any]]) -> dict[str, str]:
        """Return where to send the objects that the hub lacks.

        Raises:
            ServerError: The response is not an answer. An object that the hub does not mention counts as present, so an
                object that cannot exist is asked for, too.
        """
        from modelscope_hub.errors import ServerError

        probe = secrets.token_hex(32)
        urls = self._api.legacy.validate_blobs(self._name, "model", [*map(dict, objects), {"oid": probe, "size": 1}])
        if urls.pop(probe, None) is None:
            raise ServerError("ModelScope did not say which files it lacks.")
        return {oid: url for oid, url in urls.items() if url is not None}

    # --- the client -----------------------------------------------------------------------------------

    @cached_property
    def _config(self) -> HubConfig:
        """The client's configuration, explicit as far as the settings go, and by its environment otherwise."""
        client_logger = logging.getLogger("modelscope_hub")
        if not client_logger.handlers:  # the client would add one of its own
            client_logger.addHandler(logging.NullHandler())
        from modelscope_hub import HubConfig

        client_logger.setLevel(logging.WARNING)
        options: dict[str, Any] = {
            "endpoint": self._settings.endpoint("modelscope"),
            "token": self._settings.token("modelscope"),
        }
        return HubConfig(**{name: value for name, value in options.items() if value is not None})

    @cached_property
    def _api(self) -> HubApi:
        config = self._config
        from modelscope_hub import HubApi

        return HubApi(config)

    def _resolve(self) -> str:
        """Return the branch, tag or commit to read. ModelScope does not report commits."""
        names = [str(entry.get("Revision") or "") for entry in self._api.list_repo_revisions(self._name, "model")]
        if self._requested is None:
            return next((name for name in _DEFAULT_REVISIONS if name in names), _DEFAULT_REVISIONS[0])
        if self._requested in names:
            return self._requested
        raise RevisionNotFoundError(
            f"{self._name} on ModelScope has no branch or tag {self._requested!r}; it has "
            f"{', '.join(sorted(names)[:_MAX_REVISIONS_SHOWN]) or 'none'}."
        )

    def explain(self, error: Exception) -> Failure:
        from modelscope_hub import errors

        token = self._config.token
        where = f"{self._name} on ModelScope ({self._config.endpoint})"
        reason = reason_of(error, token)
        if isinstance(error, errors.AuthenticationError):
            problem = "the token was rejected" if token else "no token was sent"
            return Failure(
                AccessDeniedError(
                    f"{where}: {problem}. Set EMB_PROVIDER_MODELSCOPE_TOKEN to a token of this site (modelscope.cn and "
                    "modelscope.ai have different ones), or log in with `modelscope login`."
                )
            )
        if isinstance(error, errors.PermissionDeniedError):
            return Failure(
                AccessDeniedError(
                    f"{where}: access was refused ({reason}). Use a token with write permission, and an organization that "
                    "you are a member of."
                )
            )
        if isinstance(error, errors.NotExistError):
            return Failure(RepositoryNotFoundError(f"{where} does not exist, or is private ({reason})."))
        if isinstance(error, errors.RateLimitError):
            message = f"{where}: too many requests. Try again later, and use --delay."
            return Failure(HubUnavailableError(message), is_temporary=True, retry_after_s=error.retry_after)
        is_temporary = isinstance(error, errors.HubError) and error.retryable
        is_temporary |= isinstance(error, OSError) or any(phrase in reason.lower() for phrase in _CONFLICTS)
        if is_temporary:
            return Failure(HubUnavailableError(f"{where}: {reason}. Try again later."), is_temporary=True)
        return Failure(TransferError(f"{where}: {type(error).__name__}: {reason}"))


def _operation(addition: Addition) -> dict[str, Any]:
    content = addition.content
    return {
        "action": "create",
        "path": addition.path,
        "type": "lfs" if content is None else "normal",
        "size": addition.size,
        "sha256": addition.sha256 if content is None else "",
        "content": "" if content is None else base64.b64encode(content).decode(),
        "encoding": "" if content is None else "base64",
    }


def _skip(blocks: Iterator[bytes], count: int) -> Iterator[bytes]:
    """Yield blocks without the first `count` bytes, for a server that ignores Range."""
    for block in blocks:
        if count < len(block):
            yield block[count:]
        count = max(0, count - len(block))
