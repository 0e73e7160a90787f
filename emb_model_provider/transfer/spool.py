"""Large files on disk until they are sent, so that an interrupted download is resumed."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from emb_model_provider.errors import CorruptSnapshotError, ProviderError, TransferError
from emb_model_provider.snapshots.files import require_writable, translate_os_error
from emb_model_provider.snapshots.snapshot import hash_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import BinaryIO

    from emb_model_provider.hubs.transfer import RemoteFile
    from emb_model_provider.transfer.session import Session

MIN_BYTES = 8 * 1024 * 1024
"""Smaller files are read again after an interruption."""
_BLOCK_BYTES = 1 << 20


@contextmanager
def spooled(session: Session, directory: Path, file: RemoteFile) -> Iterator[BinaryIO]:
    """Yield a complete, verified file on disk. It is deleted if the block ends without an error.

    The file is named by its hash, never by its name on the hub.

    Raises:
        CorruptSnapshotError: The source sends other bytes than it lists.
        CacheNotWritableError: The directory is full or not writable.
    """
    if file.sha256 is None:
        raise AssertionError("only files with a known sha256 are spooled")
    path = directory / f"{file.sha256}.part"
    try:
        require_writable(directory, "--spool")
        _fill(session, path, file)
        stream = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb")
    except OSError as error:
        raise _disk_error(error, directory) from error
    with stream:
        yield stream
    path.unlink(missing_ok=True)


def _fill(session: Session, path: Path, file: RemoteFile) -> None:
    """Download the part of a file that is not on disk, and hash the whole file."""
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(path, flags, 0o600), "r+b") as stream:
        start = stream.seek(0, os.SEEK_END)
        if start > file.size:
            start = 0
            stream.truncate(0)
        session.add_bytes(start)
        while start < file.size:
            start = _append(session, stream, path.parent, file, start)
        stream.flush()
    if hash_file(path).sha256 != file.sha256:
        path.unlink()
        raise CorruptSnapshotError(
            f"{file.path} was downloaded with other bytes than the hub lists, and was removed. Run the same command again."
        )


def _append(session: Session, stream: BinaryIO, directory: Path, file: RemoteFile, start: int) -> int:
    """Append bytes from an offset until the connection ends, and return the new size."""

    def read() -> int:
        position = stream.seek(0, os.SEEK_END)
        for block in session.source.read(file.path, session.revision, position):
            session.cancel.raise_if_cancelled()
            try:
                stream.write(block[: file.size - position])
            except OSError as error:  # of the disk, while others are those of the network
                raise _disk_error(error, directory) from error
            position += len(block)
            session.add_bytes(len(block))
        return stream.seek(0, os.SEEK_END)

    end = session.ask_source(read, f"reading {file.path}")
    if end == start:
        raise CorruptSnapshotError(f"The hub sends only {end} of the {file.size} bytes that it lists of {file.path}.")
    return end


def _disk_error(error: OSError, directory: Path) -> ProviderError:
    return translate_os_error(error, directory, "--spool") or TransferError(
        f"Cannot store a file in {directory} ({error.strerror}). Use another directory for --spool."
    )
