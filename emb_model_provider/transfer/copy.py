"""Carries out a plan: streams what the destination lacks, then commits all files."""

from __future__ import annotations

import io
import threading
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, BinaryIO, cast

from emb_model_provider.errors import CorruptSnapshotError
from emb_model_provider.transfer import spool
from emb_model_provider.transfer.plan import find_missing
from emb_model_provider.transfer.repository import Addition
from emb_model_provider.transfer.session import MAX_IN_MEMORY_BYTES, identify_content
from emb_model_provider.transfer.verify import compare

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from emb_model_provider.hubs.transfer import RemoteFile
    from emb_model_provider.transfer.plan import Plan, PlannedFile
    from emb_model_provider.transfer.session import Session

MAX_FILES_PER_COMMIT = 2000
"""The limit of ModelScope."""
MAX_INLINE_BYTES_PER_COMMIT = 8 * 1024 * 1024
"""Of the files whose content is in the commit, which becomes a third larger in the request."""


@dataclass(frozen=True, slots=True)
class Copied:
    """What a copy did."""

    files: tuple[RemoteFile, ...]
    """The committed files, with the hashes of the bytes that were sent."""
    sent_bytes: int
    """Bytes of files that the destination received, once for each file."""
    commits: int


class Copier:
    """Copies the files of one plan."""

    def __init__(self, session: Session, plan: Plan) -> None:
        self._session = session
        self._plan = plan
        self._lock = threading.Lock()
        self._sent_bytes = 0
        self._sending: dict[str, threading.Lock] = {}
        """A lock for each sha256, so that two files with the same bytes are sent once, and spooled once."""

    def run(self) -> Copied:
        """Create the repository if necessary, upload large files, and commit all files.

        Nothing is committed before all large files were uploaded, so that a repository whose copy fails is not half a
        model.

        Raises:
            CorruptSnapshotError: The source sends other bytes than it lists. Nothing wrong was stored.
            ProviderError: A hub refuses a request, or does not respond after all retries.
            OperationCancelledError: The transfer was cancelled.
        """
        session = self._session
        if not self._plan.files:
            return Copied((), 0, 0)
        if self._plan.creates:
            self._create()
        plan = self._plan
        large = [each for each in plan.files if not self._is_small(each)]
        small = [each for each in plan.files if self._is_small(each)]
        session.begin("transfer", plan.send_bytes)
        uploaded = session.map(self._upload, large)
        committed: list[RemoteFile] = []
        commits = 0
        for group in self._groups(uploaded, small):
            commits += self._commit(group)
            committed += [identify_addition(addition) for addition in group]
        return Copied(tuple(committed), self._sent_bytes, commits)

    # --- steps ----------------------------------------------------------------------------------------

    def _create(self) -> None:
        session, plan = self._session, self._plan
        private = plan.info.private or plan.info.gated
        session.ask_destination(
            lambda: session.destination.create(private=private, license_id=plan.license),
            f"creating {session.destination_location}",
        )
        session.write("created")
        self._plan = replace(plan, missing=find_missing(session, plan.files, exists=True))

    def _is_small(self, planned: PlannedFile) -> bool:
        """Return whether a file is read as a whole: because it is sent in a commit, or to learn its hash."""
        file = planned.file
        if planned.content is not None or self._session.destination.is_inline(file.path, file.size):
            return True
        return file.sha256 is None and file.size <= MAX_IN_MEMORY_BYTES // 2

    def _upload(self, planned: PlannedFile) -> Addition:
        """Upload a file as a stream."""
        file = planned.file if planned.file.sha256 is not None else self._session.identify(planned.file)
        addition = Addition(file.path, file.size, _sha256(file), None)
        directory = self._session.options.spool
        with self._lock_of(file):
            if directory is None or file.size < spool.MIN_BYTES or not self._is_missing(file):
                with self._session.reader(file, self._session.add_bytes) as reader:
                    self._send(file, cast("BinaryIO", reader))
            else:
                with spool.spooled(self._session, directory, file) as stream:
                    self._send(file, stream)
        return addition

    def _lock_of(self, file: RemoteFile) -> threading.Lock:
        with self._lock:
            return self._sending.setdefault(_sha256(file), threading.Lock())

    def _is_missing(self, file: RemoteFile) -> bool:
        return file.sha256 in self._session.ask_destination(
            lambda: self._session.destination.find_missing([file]), f"asking for {file.path}"
        )

    def _send(self, file: RemoteFile, content: BinaryIO) -> None:
        """Store the bytes of a file, unless the hub has them. A failed upload begins again."""
        session, sha256 = self._session, _sha256(file)

        def upload() -> bool:
            content.seek(0)
            return session.destination.upload(file.path, file.size, sha256, content)

        for is_last in (False, True):
            try:
                is_sent = session.ask_destination(upload, f"sending {file.path}")
                break
            except CorruptSnapshotError:
                if is_last:  # the bytes were wrong twice
                    raise
        if is_sent:
            with self._lock:
                self._sent_bytes += file.size
        session.write("uploaded", file)

    def _read(self, planned: PlannedFile) -> Addition:
        """Read a small file. If the destination does not want it in a commit, upload it."""
        session, file = self._session, planned.file
        content = planned.content
        if content is None:
            try:
                content = session.read_file(file)
            except CorruptSnapshotError:
                content = session.read_file(file)
        known = session.record(identify_content(file.path, content))
        if session.destination.is_inline(file.path, file.size) or planned.content is not None:
            with self._lock:
                self._sent_bytes += len(content)
            session.add_bytes(len(content))
            return Addition(file.path, len(content), _sha256(known), content)
        with self._lock_of(known):
            self._send(known, io.BytesIO(content))
        session.add_bytes(len(content))
        return Addition(file.path, len(content), _sha256(known), None)

    def _groups(self, uploaded: Sequence[Addition], small: Sequence[PlannedFile]) -> Iterator[list[Addition]]:
        """Yield the files of each commit. Small files are read when their commit is due, to bound the memory."""
        group: list[Addition] = []
        inline_bytes = 0
        for addition in self._with_small_files(uploaded, small):
            size = len(addition.content or b"")
            if group and (len(group) == MAX_FILES_PER_COMMIT or inline_bytes + size > MAX_INLINE_BYTES_PER_COMMIT):
                yield group
                group, inline_bytes = [], 0
            group.append(addition)
            inline_bytes += size
        if group:
            yield group

    def _with_small_files(self, uploaded: Iterable[Addition], small: Sequence[PlannedFile]) -> Iterator[Addition]:
        yield from uploaded
        waiting = deque(small)
        while waiting:
            batch = [waiting.popleft()]
            size = batch[0].file.size
            while waiting and size + waiting[0].file.size <= MAX_INLINE_BYTES_PER_COMMIT and len(batch) < 256:
                size += waiting[0].file.size
                batch.append(waiting.popleft())
            yield from self._session.map(self._read, batch)

    def _commit(self, group: list[Addition]) -> int:
        """Commit files, and return the number of commits: none, if an earlier attempt whose answer was lost did it."""
        session = self._session
        default = f"Mirror of {session.source_location.name}@{self._plan.revision}"
        message = session.options.commit_message or default
        attempts = 0

        def commit() -> int:
            nonlocal attempts
            attempts += 1
            remaining = group
            if attempts > 1:
                listing = session.destination.list_files(session.destination.branch)
                same = compare(session, [identify_addition(each) for each in group], listing).same
                done = {file.path for file in same}
                remaining = [each for each in group if each.path not in done]
            if remaining:
                session.destination.commit(remaining, message)
            return bool(remaining)

        commits = session.ask_destination(commit, f"committing {len(group)} files to {session.destination_location}")
        for addition in group:
            session.write("committed", identify_addition(addition))
        return commits


def identify_addition(addition: Addition) -> RemoteFile:
    """Return a committed file with its hashes."""
    from emb_model_provider.hubs.transfer import RemoteFile

    if addition.content is not None:
        return identify_content(addition.path, addition.content)
    return RemoteFile(addition.path, addition.size, addition.sha256)


def _sha256(file: RemoteFile) -> str:
    if file.sha256 is None:
        raise AssertionError(f"the hash of {file.path} is not known yet")
    return file.sha256
