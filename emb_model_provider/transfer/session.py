"""One transfer between two repositories: what all of its steps share."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from emb_model_provider.errors import OperationCancelledError, TransferError
from emb_model_provider.formatting import format_size
from emb_model_provider.hubs.transfer import RemoteFile
from emb_model_provider.progress import CancelToken, Progress
from emb_model_provider.transfer.journal import JournalEntry
from emb_model_provider.transfer.reader import RemoteReader
from emb_model_provider.transfer.retry import RetryPolicy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from emb_model_provider.progress import OnProgress, Phase
    from emb_model_provider.transfer.journal import State, TransferJournal
    from emb_model_provider.transfer.location import Location
    from emb_model_provider.transfer.repository import Repository

S = TypeVar("S")
T = TypeVar("T")

MAX_IN_MEMORY_BYTES = 32 * 1024 * 1024
"""Largest file that is read into memory as a whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferOptions:
    """How repositories are transferred."""

    license: str | None = None
    """The license of a repository that is created, instead of the one that the source names."""
    commit_message: str | None = None
    """None: `Mirror of owner/name@commit`."""
    jobs: int = 4
    """Number of files that are transferred at the same time."""
    delay_s: float = 0.0
    """Pause between two repositories of a batch, in seconds."""
    spool: Path | None = None
    """Directory in which large files are stored until they are sent, so that they can be resumed. None: no file is."""
    fail_fast: bool = False
    """End a batch after the first repository that fails."""
    has_permission: bool = False
    """Confirms that gated, non-commercial and private repositories may be copied."""
    overwrite_card: bool = False
    """Replace the front matter of README.md and configuration.json of a destination that existed before."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)


class Session:
    """The two repositories of a transfer, with retries, cancellation and progress."""

    def __init__(
        self,
        locations: tuple[Location, Location],
        repositories: tuple[Repository, Repository],
        journal: TransferJournal,
        options: TransferOptions,
        on_progress: OnProgress,
        cancel: CancelToken,
    ) -> None:
        self.source_location, self.destination_location = locations
        self.source, self.destination = repositories
        self.journal = journal
        self.options = options
        self.revision = ""
        """Of the source; set when it is described."""
        # A token of its own, because a file that fails ends the other files of the repository, and no others.
        self.cancel = CancelToken(lambda: cancel.is_cancelled)
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._done_bytes = 0
        self._total_bytes: int | None = None
        self._phase: Phase = "resolve"

    # --- requests -------------------------------------------------------------------------------------

    def ask_source(self, action: Callable[[], T], what: str) -> T:
        """Return the result of a request to the source, with retries."""
        return self.options.retry.run(action, self.source.explain, self.cancel, what)

    def ask_destination(self, action: Callable[[], T], what: str) -> T:
        """Return the result of a request to the destination, with retries."""
        return self.options.retry.run(action, self.destination.explain, self.cancel, what)

    def reader(self, file: RemoteFile, on_bytes: Callable[[int], None] = lambda _: None) -> RemoteReader:
        """Return a file of the source as a stream."""
        return RemoteReader(
            self.source, self.revision, file, retry=self.options.retry, cancel=self.cancel, on_bytes=on_bytes
        )

    def read_file(self, file: RemoteFile) -> bytes:
        """Return a file of the source, whose hashes were checked.

        Raises:
            TransferError: The file is too large.
        """
        if file.size > MAX_IN_MEMORY_BYTES:
            raise TransferError(
                f"{file.path} has {format_size(file.size)}, and can only be sent within a commit, which is limited to "
                f"{format_size(MAX_IN_MEMORY_BYTES)}."
            )
        with self.reader(file) as reader:
            return reader.read()

    def read_destination(self, file: RemoteFile) -> RemoteReader:
        """Return a file of the destination as a stream."""
        return RemoteReader(
            self.destination, self.destination.branch, file, retry=self.options.retry, cancel=self.cancel
        )

    def identify(self, file: RemoteFile) -> RemoteFile:
        """Return a file of the source with both hashes. It is read, unless an earlier transfer has recorded them."""
        known = self.journal.complete(file)
        if known.sha256 is not None and known.git_sha1 is not None:
            return known
        with self.reader(file) as reader:
            reader.drain()
            return self.record(replace(file, sha256=reader.sha256, git_sha1=reader.git_sha1))

    def record(self, file: RemoteFile) -> RemoteFile:
        """Write the hashes of a file to the journal, and return it."""
        if file.git_sha1 and file.sha256 and self.journal.complete(replace(file, sha256=None)).sha256 is None:
            self.write("hashed", file)
        return file

    def write(self, state: State, file: RemoteFile | None = None, error: str = "") -> None:
        """Append an entry to the journal."""
        entry = JournalEntry(state=state, error=error)
        if file is not None:
            entry = replace(
                entry, path=file.path, size=file.size, sha256=file.sha256 or "", git_sha1=file.git_sha1 or ""
            )
        self.journal.append(self.revision, entry)

    # --- threads and progress -------------------------------------------------------------------------

    def map(self, action: Callable[[S], T], items: Iterable[S]) -> list[T]:
        """Return the results of an action for all items, several of which run at the same time.

        The first error ends the others, and is raised.
        """
        with ThreadPoolExecutor(self.options.jobs, thread_name_prefix="transfer") as pool:
            futures = [pool.submit(action, item) for item in items]
            done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
            if any(future.exception() is not None for future in done):
                self.cancel.cancel()
                for future in waiting:
                    future.cancel()
        errors = [error for future in futures if not future.cancelled() and (error := future.exception()) is not None]
        # Of several errors, those that only say that another one ended the work come last.
        for error in sorted(errors, key=lambda each: isinstance(each, OperationCancelledError)):
            raise error
        return [future.result() for future in futures]

    def begin(self, phase: Phase, total_bytes: int | None = None) -> None:
        """Report the beginning of a phase."""
        with self._lock:
            self._phase, self._done_bytes, self._total_bytes = phase, 0, total_bytes
        self.add_bytes(0)

    def add_bytes(self, count: int) -> None:
        """Report that bytes were transferred; a negative number, if they are transferred again."""
        with self._lock:
            self._done_bytes = max(0, self._done_bytes + count)
            done = self._done_bytes if self._total_bytes is None else min(self._done_bytes, self._total_bytes)
            self._on_progress(Progress(self._phase, self.source_location.name, done, self._total_bytes))


def identify_content(path: str, content: bytes) -> RemoteFile:
    """Return a file with the hashes of its content."""
    git_sha1 = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return RemoteFile(path, len(content), hashlib.sha256(content).hexdigest(), git_sha1)
