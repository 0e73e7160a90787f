"""Uploaded files, and the output and error files of batches."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import secrets
import shutil
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import sqlalchemy as sa

from emb_model_provider.batch_jobs.database import is_storable, now, reading, transaction
from emb_model_provider.batch_jobs.tables import batches, files
from emb_model_provider.batch_jobs.types import UNFINISHED, Page
from emb_model_provider.errors import FileTooLargeError, StateConflictError, StorageFullError, UnknownFileError
from emb_model_provider.formatting import format_size

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from pathlib import Path
    from types import TracebackType
    from typing import Literal, Self

    from sqlalchemy import Connection, Engine

    from emb_model_provider.batch_jobs.database import Clock

DEFAULT_EXPIRY_S: Final = 30 * 24 * 3600
INPUT, OUTPUT = "batch", "batch_output"
"""Purposes of files."""

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CHECK_SPACE_EVERY = 8_000_000
"""Bytes of an upload."""
_ORPHAN_S = 3600.0
"""Age of a file without a row in the table that is no upload in progress."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file. Times are Unix times in seconds."""

    id: str
    owner: str
    """Name of the API key; "" without keys."""
    filename: str
    purpose: str
    bytes: int
    sha256: str
    created_at: float
    expires_at: float | None


class FileStore:
    """Files in a directory, and their table. Thread-safe; several processes can use the same directory.

    The content of a file is written and synchronized before its row is, and removed after it, so that each row has its
    content. `owner` is the name of the API key of the caller, which sees only its own files; None: all files.
    """

    def __init__(
        self,
        engine: Engine,
        directory: Path,
        *,
        max_bytes: int = 200_000_000,
        reserve_bytes: int = 1_000_000_000,
        clock: Clock = now,
    ) -> None:
        """Create a store.

        Args:
            engine: The opened database.
            directory: The directory of the batches.
            max_bytes: Largest upload.
            reserve_bytes: Space on the disk that uploads leave free.
            clock: Returns the Unix time in seconds.
        """
        self.engine = engine
        self.directory = directory / "files"
        self.directory.mkdir(parents=True, exist_ok=True)
        self.max_bytes = max_bytes
        self.reserve_bytes = reserve_bytes
        self.clock = clock

    def upload(
        self,
        owner: str,
        filename: str,
        *,
        purpose: str = INPUT,
        expires_after_s: int = DEFAULT_EXPIRY_S,
        expected_bytes: int = 0,
    ) -> Upload:
        """Begin an upload. `expected_bytes` is its size if it is known, so that one that does not fit fails at once.

        Raises:
            FileTooLargeError: It is larger than `max_bytes`.
            StorageFullError: It would leave less space than `reserve_bytes`.
        """
        if expected_bytes > self.max_bytes:
            raise FileTooLargeError(self.max_bytes)
        self.require_space(expected_bytes)
        return Upload(self, owner, filename, purpose, expires_after_s, self.max_bytes)

    def output(self, owner: str, filename: str, expires_after_s: int) -> Upload:
        """Begin a file of results, which has no limit. The caller records what `store` returns."""
        return Upload(self, owner, filename, OUTPUT, expires_after_s, None)

    def get(self, owner: str | None, file_id: str) -> StoredFile:
        """Return a file.

        Raises:
            UnknownFileError: It does not exist, has expired, or it belongs to another owner.
        """
        with reading(self.engine) as connection:
            return self.find(connection, owner, file_id)

    def find(
        self,
        connection: Connection,
        owner: str | None,
        file_id: str,
        *,
        param: str = "id",
        lock: Literal["share", "update"] | None = None,
    ) -> StoredFile:
        """Return a file within a transaction, else raise UnknownFileError with `param`.

        With `lock`, it is not deleted before the end of the transaction: "share" to read it, "update" to delete it.
        """
        query = sa.select(files).where(files.c.id == file_id, *self._visible(connection, owner))
        if lock is not None:
            query = query.with_for_update(read=lock == "share")
        row = connection.execute(query).one_or_none() if is_storable(file_id) else None
        if row is None:
            raise UnknownFileError(file_id, param=param)
        return StoredFile(**row._mapping)

    def list(
        self,
        owner: str | None,
        *,
        after: str | None = None,
        limit: int = 10_000,
        order: Literal["asc", "desc"] = "desc",
        purpose: str | None = None,
    ) -> Page[StoredFile]:
        """Return up to `limit` files in the order of their creation, those after the file `after`.

        Raises:
            UnknownFileError: `after` does not exist.
        """
        if purpose is not None and not is_storable(purpose):
            return Page((), has_more=False)
        with reading(self.engine) as connection:
            query = sa.select(files).where(*self._visible(connection, owner))
            if purpose is not None:
                query = query.where(files.c.purpose == purpose)
            key = sa.tuple_(files.c.created_at, files.c.id)
            if after is not None:
                last = self.find(connection, owner, after, param="after")
                position = sa.tuple_(sa.literal(last.created_at), sa.literal(last.id))
                query = query.where(key < position if order == "desc" else key > position)
            columns = (files.c.created_at, files.c.id)
            query = query.order_by(*(column.desc() if order == "desc" else column for column in columns))
            rows = connection.execute(query.limit(limit + 1)).all()
        found = tuple(StoredFile(**row._mapping) for row in rows[:limit])
        return Page(found, len(rows) > limit)

    def content(self, owner: str | None, file_id: str) -> Path:
        """Return the path of the content of a file. Raises UnknownFileError like `get`."""
        return self.path(self.get(owner, file_id).id)

    def delete(self, owner: str | None, file_id: str) -> None:
        """Delete a file.

        Raises:
            UnknownFileError: It does not exist.
            StateConflictError: A batch that has not ended reads it.
        """
        with transaction(self.engine) as connection:
            self.find(connection, owner, file_id, lock="update")
            used = sa.select(batches.c.id).where(batches.c.input_file_id == file_id, batches.c.state.in_(UNFINISHED))
            if (batch_id := connection.scalar(used.limit(1))) is not None:
                raise StateConflictError(
                    f"The file {file_id} is the input of the batch {batch_id}, which has not ended. Wait for it, or cancel it.",
                    param="id",
                )
            connection.execute(sa.delete(files).where(files.c.id == file_id))
        self.path(file_id).unlink(missing_ok=True)

    def total_bytes(self) -> int:
        """Return the size of all files."""
        with reading(self.engine) as connection:
            return int(connection.scalar(sa.select(sa.func.coalesce(sa.func.sum(files.c.bytes), 0))) or 0)

    def remove_expired(self) -> int:
        """Delete expired files that no unfinished batch reads, and what interrupted uploads left. Returns their number."""
        with transaction(self.engine) as connection:
            inputs = sa.select(batches.c.input_file_id).where(batches.c.state.in_(UNFINISHED))
            expired = files.c.expires_at <= self.clock(connection)
            query = sa.select(files.c.id).where(expired, files.c.id.not_in(inputs))
            if ids := connection.scalars(query).all():
                self.lock_rows(connection, ids)
                ids = connection.scalars(query).all()  # without those that a new batch reads meanwhile
                self.remove_rows(connection, ids)
        self.remove_content(ids)
        self._remove_orphans()
        return len(ids)

    # --- for the stores of this package ---------------------------------------------------------------

    def path(self, file_id: str) -> Path:
        return self.directory / file_id

    def record(self, connection: Connection, file: StoredFile) -> None:
        """Add the row of a file that is completely written."""
        values = {name: getattr(file, name) for name in StoredFile.__slots__}
        connection.execute(sa.insert(files).values(values))

    def lock_rows(self, connection: Connection, file_ids: Collection[str]) -> None:
        """Lock files that are to be deleted until the end of a transaction, so that no new batch begins to read them."""
        query = sa.select(files.c.id).where(files.c.id.in_(file_ids)).order_by(files.c.id)
        connection.execute(query.with_for_update()).all()

    def remove_rows(self, connection: Connection, file_ids: Collection[str]) -> None:
        connection.execute(sa.delete(files).where(files.c.id.in_(file_ids)))

    def remove_content(self, file_ids: Iterable[str]) -> None:
        """Remove the content of files whose rows were removed."""
        for file_id in file_ids:
            self.path(file_id).unlink(missing_ok=True)

    def free_bytes(self) -> int:
        """Return how much can still be written to the disk."""
        return shutil.disk_usage(self.directory).free

    def require_space(self, size: int) -> None:
        """Raise StorageFullError if a file of `size` bytes would leave less space than `reserve_bytes`."""
        free = self.free_bytes()
        if free - size < self.reserve_bytes:
            raise StorageFullError(
                f"The disk of the files has {format_size(free)} left, of which {format_size(self.reserve_bytes)} are kept "
                "free. Delete files that are no longer needed, and upload the file again."
            )

    def _visible(self, connection: Connection, owner: str | None) -> tuple[sa.ColumnElement[bool], ...]:
        current = sa.or_(files.c.expires_at.is_(None), files.c.expires_at > self.clock(connection))
        return (current,) if owner is None else (current, files.c.owner == owner)

    def _remove_orphans(self) -> None:
        """Remove files without a row that were not changed for a while."""
        limit = time.time() - _ORPHAN_S
        old = []
        with os.scandir(self.directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if entry.stat().st_mtime < limit:
                        old.append(entry.name)
        for start in range(0, len(old), 500):
            part = old[start : start + 500]
            with reading(self.engine) as connection:
                known = set(connection.scalars(sa.select(files.c.id).where(files.c.id.in_(part))))
            for name in part:
                if name not in known:
                    (self.directory / name).unlink(missing_ok=True)


class Upload:
    """A file that is being written. A context manager that removes the content unless `commit` was called."""

    def __init__(
        self, store: FileStore, owner: str, filename: str, purpose: str, expires_after_s: int, max_bytes: int | None
    ) -> None:
        self._store = store
        self._max_bytes = max_bytes
        self._owner = owner
        self._filename = clean_filename(filename)
        self._purpose = purpose
        self._expires_after_s = expires_after_s
        self._id = new_id("file")
        self._temporary = store.directory / f".{self._id}.tmp"
        self._hash = hashlib.sha256()
        self._bytes = 0
        self._unchecked = 0
        with _full_disk_reported():
            self._stream = self._temporary.open("xb", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()
        self._temporary.unlink(missing_ok=True)

    def expire_after(self, seconds: int) -> None:
        """Set when the file expires, which a form can say after the file."""
        self._expires_after_s = seconds

    def write(self, block: bytes | bytearray | memoryview) -> None:
        """Append bytes.

        Raises:
            FileTooLargeError: The file is larger than the limit.
            StorageFullError: The disk is full, or would have less than its reserve.
        """
        view = memoryview(block)
        self._bytes += len(view)
        if self._max_bytes is not None:
            if self._bytes > self._max_bytes:
                raise FileTooLargeError(self._max_bytes)
            self._unchecked += len(view)
            if self._unchecked >= _CHECK_SPACE_EVERY:
                self._store.require_space(0)
                self._unchecked = 0
        self._hash.update(view)
        with _full_disk_reported():
            while len(view):
                view = view[self._stream.write(view) or 0 :]

    @property
    def size(self) -> int:
        return self._bytes

    def commit(self) -> StoredFile:
        """Make the content durable, and add the file to the table."""
        with reading(self._store.engine) as connection:
            file = self.store(self._store.clock(connection))
        try:
            with transaction(self._store.engine) as connection:
                self._store.record(connection, file)
        except Exception:
            # Whether the row was committed is unknown if the connection was lost.
            with contextlib.suppress(Exception):
                self._store.delete(None, file.id)
            raise
        return file

    def store(self, created_at: float) -> StoredFile:
        """Make the content durable under its final name, and return the file, which is not yet in the table."""
        with _full_disk_reported():
            os.fsync(self._stream.fileno())
            self._stream.close()
            self._temporary.rename(self._store.path(self._id))
            sync_directory(self._store.directory)
        return StoredFile(
            id=self._id,
            owner=self._owner,
            filename=self._filename,
            purpose=self._purpose,
            bytes=self._bytes,
            sha256=self._hash.hexdigest(),
            created_at=created_at,
            expires_at=created_at + self._expires_after_s,
        )


def new_id(prefix: str) -> str:
    """Return a random id in the form of OpenAI's."""
    return f"{prefix}-{secrets.token_hex(16)}" if prefix == "file" else f"{prefix}_{secrets.token_hex(16)}"


def sync_directory(directory: Path) -> None:
    """Make the names of the files in a directory durable."""
    if os.name == "nt":  # Windows cannot open directories
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_disk_full(error: OSError) -> bool:
    return error.errno in _FULL


def clean_filename(filename: str) -> str:
    """Return the name of an uploaded file without directories, and without characters that a database cannot store."""
    name = filename.replace("\\", "/").rpartition("/")[2][:255]
    name = name.encode("utf-8", "replace").decode()
    return "".join(char if char.isprintable() else "?" for char in name) or "file.jsonl"


@contextlib.contextmanager
def _full_disk_reported() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            raise StorageFullError(
                "The disk of the files is full. Delete files that are no longer needed, and upload the file again."
            ) from error
        raise
