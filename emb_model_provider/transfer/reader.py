"""A file of a repository as a stream, hashed while it is read."""

from __future__ import annotations

import hashlib
import io
import os
from typing import TYPE_CHECKING

from emb_model_provider.errors import CorruptSnapshotError, HubUnavailableError, ProviderError
from emb_model_provider.transfer.repository import Failure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from emb_model_provider.hubs.transfer import RemoteFile
    from emb_model_provider.progress import CancelToken
    from emb_model_provider.transfer.repository import Repository
    from emb_model_provider.transfer.retry import RetryPolicy


class RemoteReader(io.BufferedIOBase):
    """A file of a repository, which the clients of the hubs read as they would read a file on disk.

    - Memory holds one block. A dropped connection continues at the same byte.
    - The last block is given out only after the hash of the whole file was found right: an upload of wrong bytes stays
      incomplete, so that no hub can store them.
    - Seeking sends no request; the next read starts there.
    """

    def __init__(
        self,
        source: Repository,
        revision: str,
        file: RemoteFile,
        *,
        retry: RetryPolicy,
        cancel: CancelToken,
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Create a reader, without a request.

        Args:
            source: The repository that has the file.
            revision: The commit, branch or tag.
            file: The file as the hub lists it. It is compared with the hashes that are listed.
            retry: How often a dropped connection is continued without progress in between.
            cancel: Ends a read.
            on_bytes: Called with the number of bytes of each block, and with a negative number when the file is read
                again from an earlier offset.
        """
        super().__init__()
        self.file = file
        self._source, self._revision = source, revision
        self._retry, self._cancel, self._on_bytes = retry, cancel, on_bytes
        self._position = 0
        self._blocks: Iterator[bytes] | None = None
        self._block = memoryview(b"")
        self._block_start = 0
        self._hashed = 0
        self._sha256 = hashlib.sha256()
        self._git_sha1 = self._new_git_sha1()

    # --- as a file ------------------------------------------------------------------------------------

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, origin: int = os.SEEK_SET, /) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.file.size}[origin]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        """Return up to `size` bytes; fewer only at the end of the file.

        Raises:
            CorruptSnapshotError: The bytes of the file differ from the listing.
            ProviderError: The hub does not send the file.
            OperationCancelledError: The transfer was cancelled.
        """
        wanted = self.file.size - self._position
        if size is not None and size >= 0:
            wanted = min(size, wanted)
        parts: list[bytes] = []
        while wanted > 0:
            offset = self._position - self._block_start
            if not 0 <= offset < len(self._block):
                self._load_block()
                continue
            part = bytes(self._block[offset : offset + wanted])
            parts.append(part)
            self._position += len(part)
            wanted -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def readinto(self, buffer: bytearray | memoryview, /) -> int:  # type: ignore[override]
        part = self.read(len(buffer))
        buffer[: len(part)] = part
        return len(part)

    read1 = read

    def close(self) -> None:
        self._close_blocks()
        super().close()

    # --- blocks ---------------------------------------------------------------------------------------

    @property
    def sha256(self) -> str:
        """The hash of the file, once it was read to its end."""
        return self._sha256.hexdigest()

    @property
    def git_sha1(self) -> str:
        """The id of the file as a git blob, once it was read to its end."""
        return self._git_sha1.hexdigest()

    def drain(self) -> str:
        """Read the file to its end and return its sha256."""
        while self.read(1 << 20):
            pass
        return self.sha256

    def _load_block(self) -> None:
        """Make the next block the current one, or the first block if the position is before the current one.

        Bytes are never skipped, because each of them is hashed.
        """
        if self._position < self._block_start:
            self._restart()
        start = self._hashed
        block = self._receive(start)
        self._block, self._block_start = memoryview(block), start
        self._hash(block)

    def _receive(self, start: int) -> bytes:
        """Return the next block, over a new connection if the old one was dropped."""
        attempt = 1
        while True:
            self._cancel.raise_if_cancelled()
            try:
                if self._blocks is None:
                    self._blocks = self._source.read(self.file.path, self._revision, start)
                block = next(self._blocks, b"")
            except ProviderError:
                raise
            except Exception as error:  # noqa: BLE001 - the clients raise errors of several libraries
                failure = self._source.explain(error)
            else:
                if start + len(block) > self.file.size:
                    raise CorruptSnapshotError(
                        f"{self.file.path} is larger than the {self.file.size} bytes that the hub lists. Run the same "
                        "command again; if that does not help, report it to the owner of the repository."
                    )
                if block:
                    return block
                lost = f"The hub sent only {start} of the {self.file.size} bytes of {self.file.path}. Try again later."
                failure = Failure(HubUnavailableError(lost), is_temporary=True)
            self._close_blocks()
            self._retry.wait(failure, attempt, self._cancel, f"reading {self.file.path}")
            attempt += 1

    def _hash(self, block: bytes) -> None:
        self._on_bytes(len(block))
        self._hashed += len(block)
        self._sha256.update(block)
        self._git_sha1.update(block)
        if self._hashed < self.file.size:
            return
        is_same = self.file.sha256 in (None, self.sha256) and self.file.git_sha1 in (None, self.git_sha1)
        if not is_same:
            sha256 = self.sha256
            self._restart()
            raise CorruptSnapshotError(
                f"{self.file.path} has other bytes than the hub lists (sha256 {sha256[:12]}…), and was not sent. "
                "Run the same command again; if that does not help, report it to the owner of the repository."
            )

    def _restart(self) -> None:
        """Forget what was read, so that the next block is the first one."""
        self._close_blocks()
        self._on_bytes(-self._hashed)
        self._block, self._block_start = memoryview(b""), 0
        self._hashed, self._sha256, self._git_sha1 = 0, hashlib.sha256(), self._new_git_sha1()

    def _close_blocks(self) -> None:
        blocks, self._blocks = self._blocks, None
        close = getattr(blocks, "close", None)
        if close is not None:
            close()

    def _new_git_sha1(self) -> hashlib._Hash:
        return hashlib.sha1(b"blob %d\0" % self.file.size, usedforsecurity=False)
