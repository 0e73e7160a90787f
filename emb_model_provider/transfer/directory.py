"""A directory on this machine as the destination of a transfer."""

from __future__ import annotations

import hashlib
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from emb_model_provider.errors import TransferError
from emb_model_provider.formatting import first_line
from emb_model_provider.hubs.transfer import RemoteFile
from emb_model_provider.snapshots.snapshot import hash_file
from emb_model_provider.transfer.repository import Failure, RepositoryInfo

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import BinaryIO

    from emb_model_provider.settings import HubSettings
    from emb_model_provider.transfer.location import Location
    from emb_model_provider.transfer.repository import Addition

_BLOCK_BYTES = 1 << 20
_STAGING = ".transfer"
"""Folder in the directory for files that are not complete."""


class DirectoryRepository:
    """A directory that a repository is copied to. Links in it are never followed."""

    branch = "local"
    max_inline_bytes = 64 * 1024

    def __init__(self, location: Location, settings: HubSettings) -> None:  # noqa: ARG002 - no hub
        self._root = Path(location.name)

    def describe(self) -> RepositoryInfo | None:
        if not self._root.is_dir():
            return None
        return RepositoryInfo(revision="local", private=True)

    def list_files(self, revision: str) -> Mapping[str, RemoteFile]:  # noqa: ARG002 - there is only one
        files: dict[str, RemoteFile] = {}
        for parent, folders, names in os.walk(self._root):
            if Path(parent) == self._root and _STAGING in folders:
                folders.remove(_STAGING)
            for path in (Path(parent) / name for name in names):
                if stat.S_ISREG(path.lstat().st_mode):
                    name = path.relative_to(self._root).as_posix()
                    hashes = hash_file(path)
                    files[name] = RemoteFile(name, hashes.size, hashes.sha256)
        return files

    def read(self, path: str, revision: str, start: int = 0) -> Iterator[bytes]:  # noqa: ARG002 - there is only one
        with self._safe(path).open("rb") as stream:
            stream.seek(start)
            while block := stream.read(_BLOCK_BYTES):
                yield block

    def is_inline(self, path: str, size: int) -> bool:  # noqa: ARG002 - by size only
        return size <= self.max_inline_bytes

    def require_login(self) -> None:
        """Do nothing: the file system checks permissions."""

    def create(self, *, private: bool, license_id: str | None) -> None:  # noqa: ARG002 - directories have neither
        self._root.mkdir(parents=True, exist_ok=True)

    def find_missing(self, files: Sequence[RemoteFile]) -> frozenset[str]:
        return frozenset(file.sha256 for file in files if file.sha256 is not None)

    def upload(self, path: str, size: int, sha256: str, content: BinaryIO) -> bool:  # noqa: ARG002 - the reader checks both
        with self._create(self._staged(path)) as stream:
            while block := content.read(_BLOCK_BYTES):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        return True

    def commit(self, additions: Sequence[Addition], message: str) -> None:  # noqa: ARG002 - directories have no history
        for addition in additions:
            staged = self._staged(addition.path)
            if addition.content is not None:
                with self._create(staged) as stream:
                    stream.write(addition.content)
            target = self._safe(addition.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            staged.replace(target)
        staging = self._root / _STAGING
        if staging.is_dir() and not any(staging.iterdir()):
            staging.rmdir()

    def explain(self, error: Exception) -> Failure:
        return Failure(TransferError(f"{self._root}: {first_line(error)}. Check the disk and its permissions."))

    def _staged(self, path: str) -> Path:
        """Return where a file is until it is committed."""
        return self._safe(f"{_STAGING}/{hashlib.sha256(path.encode()).hexdigest()}")

    def _create(self, path: Path) -> BinaryIO:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb")

    def _safe(self, name: str) -> Path:
        """Return the path of a file, unless a folder on the way is a link, which could lead anywhere."""
        path = self._root
        for part in name.split("/")[:-1]:
            path /= part
            if path.is_symlink():
                raise TransferError(
                    f"{path} is a link: nothing was written through it. Remove it, or use another directory."
                )
        return self._root / name
