"""The interface of repositories on hubs and of directories, and the table of their classes."""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol, cast

from emb_model_provider.errors import CorruptSnapshotError
from emb_model_provider.formatting import first_line, printable
from emb_model_provider.snapshots.snapshot import is_safe_path

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import BinaryIO

    from emb_model_provider.errors import ProviderError
    from emb_model_provider.hubs.transfer import RemoteFile
    from emb_model_provider.settings import HubSettings
    from emb_model_provider.transfer.location import Location, Site

REPOSITORIES: Final[dict[Site, str]] = {
    "huggingface": "emb_model_provider.transfer.huggingface:HuggingFaceRepository",
    "modelscope": "emb_model_provider.transfer.modelscope:ModelScopeRepository",
    "directory": "emb_model_provider.transfer.directory:DirectoryRepository",
}
"""Each site's class, which is imported only if the site is used."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SHA1 = re.compile(r"[0-9a-f]{40}")
_QUERY = re.compile(r"\?[^\s'\")>]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class RepositoryInfo:
    """What a hub says about a repository."""

    revision: str
    """The commit that the branch or tag refers to now, if the hub reports it, else the branch or tag."""
    private: bool = False
    gated: bool = False
    license: str | None = None
    """The id, such as `apache-2.0`; for `other`, the name of the license."""


@dataclass(frozen=True, slots=True)
class Addition:
    """A file to commit."""

    path: str
    size: int
    sha256: str
    content: bytes | None
    """None if the bytes were uploaded before."""


@dataclass(frozen=True, slots=True)
class Failure:
    """An error of a hub's client, as this package reports it."""

    error: ProviderError
    is_temporary: bool = False
    """Whether the same request can succeed later."""
    retry_after_s: float | None = None
    """How long the hub asks to wait."""


class Repository(Protocol):
    """A repository on a hub, or a directory. Thread-safe. All methods raise the errors of the hub's client."""

    branch: str
    """The branch that files are committed to."""
    max_inline_bytes: int
    """Largest file whose content is sent within a commit, except for those that a hub needs there."""

    def __init__(self, location: Location, settings: HubSettings) -> None: ...

    def describe(self) -> RepositoryInfo | None:
        """Return what the hub says, or None if the repository does not exist."""

    def list_files(self, revision: str) -> Mapping[str, RemoteFile]:
        """Return the files of a revision by their paths. The paths are not checked."""

    def read(self, path: str, revision: str, start: int = 0) -> Iterator[bytes]:
        """Yield the bytes of a file from an offset in blocks of at most 1 MiB."""

    def is_inline(self, path: str, size: int) -> bool:
        """Return whether the hub needs a file of this name and size within a commit."""

    def require_login(self) -> None:
        """Ask the hub whose token it is."""

    def create(self, *, private: bool, license_id: str | None) -> None:
        """Create the repository."""

    def find_missing(self, files: Sequence[RemoteFile]) -> frozenset[str]:
        """Return the sha256 of those files whose bytes no repository on this hub has."""

    def upload(self, path: str, size: int, sha256: str, content: BinaryIO) -> bool:
        """Store the bytes of a file, to be committed later. Return False if the hub has them already."""

    def commit(self, additions: Sequence[Addition], message: str) -> None:
        """Add files to the default branch, or replace them. Other files stay as they are."""

    def explain(self, error: Exception) -> Failure:
        """Return the error to report for an error of the client, and whether to retry."""


def open_repository(location: Location, settings: HubSettings) -> Repository:
    """Return a repository. Imports the hub's client only when it is used, and sends no request."""
    module, _, kind = REPOSITORIES[location.site].partition(":")
    return cast("Repository", getattr(importlib.import_module(module), kind)(location, settings))


def reason_of(error: BaseException, token: str | None) -> str:
    """Return an error of a client in one line, without the token and the queries of URLs, which can be signed."""
    return printable(_QUERY.sub("?…", first_line(error, secret=token)))


def checked_listing(files: Iterable[RemoteFile], origin: str) -> dict[str, RemoteFile]:
    """Return a hub's listing by path. Names and hashes become parts of paths and requests, so they are checked.

    Raises:
        CorruptSnapshotError: A name would be outside of a directory, or occurs twice.
    """
    listing: dict[str, RemoteFile] = {}
    for file in files:
        parts = file.path.lower().split("/")
        if not is_safe_path(file.path) or ".git" in parts or not file.path.isprintable():
            raise CorruptSnapshotError(
                f"{origin} lists a file named {file.path!r}, which could be written outside of its directory: nothing "
                "was transferred. Do not use this repository, and report it to its owner."
            )
        if file.path in listing or file.size < 0:
            raise CorruptSnapshotError(f"{origin} lists {file.path!r} twice, or with a negative size. Try again later.")
        listing[file.path] = replace(
            file,
            sha256=file.sha256 if _SHA256.fullmatch(file.sha256 or "") else None,
            git_sha1=file.git_sha1 if _SHA1.fullmatch(file.git_sha1 or "") else None,
        )
    return listing
