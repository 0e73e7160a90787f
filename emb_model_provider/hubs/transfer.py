"""Runs the transfers of the hub clients: counts their bytes, ends them when they are cancelled, and hashes the files."""

from __future__ import annotations

import threading
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from emb_model_provider.errors import CorruptSnapshotError, HubError, OperationCancelledError
from emb_model_provider.progress import CancelToken, Progress
from emb_model_provider.snapshots.snapshot import SnapshotFile, hash_file

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from emb_model_provider.progress import OnProgress

T = TypeVar("T")

_POLL_S = 0.5
_END_S = 1.0
_MAX_BLOCK = 32 * 1024**2
"""Bytes that the ModelScope client reports at once at most, unless it resumes a file. Its blocks have 1 to 16 MiB."""


class TransferCancelled(BaseException):
    """Ends a thread of the ModelScope client, which would retry after an Exception."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file in a hub's listing."""

    path: str
    size: int
    sha256: str | None
    """Lower-case hex. No hub lists it for every file."""
    git_sha1: str | None = None
    """The id of the file as a git blob, if it is listed and sha256 is not."""

    def verify(self, directory: Path) -> SnapshotFile | None:
        """Hash the downloaded file and return it, or None if its bytes differ from the listing."""
        hashes = hash_file(directory / self.path, git=self.git_sha1 is not None)
        is_same = self.sha256 in (None, hashes.sha256) and self.git_sha1 in (None, hashes.git_sha1)
        if hashes.size != self.size or not is_same:
            return None
        return SnapshotFile(self.path, hashes.size, hashes.sha256)


class ByteCounter:
    """Adds up the bytes of files that are transferred in parallel, and reports their total."""

    def __init__(self, repository: str, total_bytes: int, on_progress: OnProgress, cancel: CancelToken) -> None:
        self._repository = repository
        self._total = total_bytes
        self._done = self._resumed = 0
        self._lock = threading.Lock()
        self._on_progress = on_progress
        # A token of its own, because an interrupt ends the transfer but must not cancel other work of the caller.
        self._cancel = CancelToken(lambda: cancel.is_cancelled)
        self._error: HubError | None = None

    def add(self, count: int, *, resumed: bool = False) -> None:
        """Count bytes, a negative number if a file is transferred again. A cancellation ends the calling thread.

        Args:
            count: The number of bytes.
            resumed: They are of an earlier download.
        """
        with self._lock:
            self._cancel.raise_if_cancelled()
            self._done = max(0, self._done + count)
            if resumed:
                self._resumed += count
            self._on_progress(
                Progress(
                    "download",
                    self._repository,
                    min(self._done, self._total),
                    self._total,
                    resumed_bytes=min(self._done, self._resumed),
                )
            )

    def cancel(self) -> None:
        self._cancel.cancel()

    def of(self, path: str, size: int) -> FileCounter:
        """Return a counter for one of the files, which may not have more than `size` bytes."""
        return FileCounter(self, path, size)

    def fail(self, error: HubError) -> None:
        """Let the transfer end with an error, whatever the client makes of the exception in its own thread."""
        self._error = error

    def raise_if_failed(self) -> None:
        if self._error is not None:
            raise self._error


class FileCounter:
    """Counts the bytes of one file, and ends its transfer if it has more than the hub has announced."""

    def __init__(self, counter: ByteCounter, path: str, size: int) -> None:
        self._counter = counter
        self._path = path
        self._size = size
        self._received = 0

    def add(self, count: int, *, resumed: bool = False) -> None:
        """Count bytes as `ByteCounter.add` does.

        Raises:
            CorruptSnapshotError: The file is larger than announced. One more block may have been written.
        """
        self._received += count
        if self._received > self._size + _MAX_BLOCK:
            error = CorruptSnapshotError(
                f"The hub sends more bytes of {self._path} than the {self._size} that it lists: the download was ended. Try "
                "again later, or use another mirror."
            )
            self._counter.fail(error)
            raise error
        self._counter.add(count, resumed=resumed)

    def restart(self) -> None:
        """Take back what was counted, because the transfer starts again."""
        received, self._received = self._received, 0
        if received:
            self._counter.add(-received)


def run_all(tasks: Sequence[Callable[[], T]], counter: ByteCounter, *, threads: int) -> list[T]:
    """Run transfers on threads and return their results, unless the counter's transfer is cancelled first.

    A client's threads cannot be interrupted while a hub sends nothing. After a cancellation or Ctrl-C they have a moment
    to end; a thread that does not is abandoned, and ends at its next byte.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="transfer")
    futures: list[Future[T]] = []
    is_abandoned = False
    try:
        futures += [pool.submit(task) for task in tasks]
        waiting = set(futures)
        while waiting:
            done, waiting = wait(waiting, timeout=_POLL_S, return_when=FIRST_EXCEPTION)
            counter.raise_if_failed()
            counter.add(0)  # reports the total even if no byte arrives, and raises after a cancellation
            for future in done:
                future.result()
        return [future.result() for future in futures]
    except (OperationCancelledError, CorruptSnapshotError, KeyboardInterrupt):
        is_abandoned = True
        counter.cancel()
        for future in futures:
            future.cancel()
        wait(futures, timeout=_END_S)
        raise
    finally:
        pool.shutdown(wait=not is_abandoned, cancel_futures=True)


def verify_files(
    repository: str,
    directory: Path,
    files: Sequence[RemoteFile],
    on_wrong: Callable[[RemoteFile], SnapshotFile],
    on_progress: OnProgress,
) -> list[SnapshotFile]:
    """Hash files. `on_wrong` replaces a file whose bytes differ from the listing, or raises an error."""
    done, total = 0, sum(file.size for file in files)
    verified: list[SnapshotFile] = []
    for file in files:
        verified.append(file.verify(directory) or on_wrong(file))
        done += file.size
        on_progress(Progress("verify", repository, done, total))
    return verified


def bar_class(counter: FileCounter) -> Any:
    """Return a progress bar class for the Hugging Face client, which creates an instance for each file."""

    class Bar:
        def __init__(self, *_: object, initial: int = 0, **__: object) -> None:
            counter.add(initial, resumed=True)

        def __enter__(self) -> Bar:
            return self

        def update(self, n: float | None = 1) -> None:
            if n:
                counter.add(int(n))

        def __exit__(self, *_: object, **__: object) -> None: ...

        # Of a transfer with xet the bytes of the file are counted, not those on the network.
        update_transfer = set_postfix_str = set_transfer_postfix_str = close = __exit__

    return Bar


def callback_class(counter: ByteCounter) -> Any:
    """Return a progress callback class for the ModelScope client, which creates an instance for each file."""
    from modelscope_hub import ProgressCallback

    class Callback(ProgressCallback):
        def __init__(self, filename: str, file_size: int) -> None:
            super().__init__(filename, file_size)
            self._counter = counter.of(filename, file_size)

        def update(self, size: int) -> None:
            try:
                self._counter.add(size, resumed=size > _MAX_BLOCK)
            except (OperationCancelledError, CorruptSnapshotError) as error:
                raise TransferCancelled from error

    return Callback
