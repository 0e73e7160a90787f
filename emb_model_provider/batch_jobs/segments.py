"""Segments: the results of chunks on disk, until the batch ends and they become its output and error files.

Each lease of a chunk has its own segment, so that a worker that lost its lease cannot change the segment of another one.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from emb_model_provider.batch_jobs.files import sync_directory
from emb_model_provider.batch_jobs.lines import id_of_line
from emb_model_provider.snapshots.files import list_dir, size_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path
    from types import TracebackType
    from typing import Self

_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Segment:
    """A complete segment: lines of the output file, then lines of the error file."""

    name: str
    sha256: str
    output_bytes: int


class SegmentStore:
    """The segments of all batches."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "segments"

    def write(self, batch_id: str, seq: int, fence: int, output: list[bytes], errors: list[bytes]) -> Segment:
        """Write a segment durably.

        Raises:
            OSError: It could not be written. Nothing is left on disk.
        """
        directory = self._directory / batch_id
        if not directory.exists():
            directory.mkdir(parents=True, exist_ok=True)
            sync_directory(self._directory)
        name = f"{seq:06d}.{fence}.jsonl"
        digest = hashlib.sha256()
        try:
            with (directory / name).open("wb") as stream:
                for line in (*output, *errors):
                    digest.update(line)
                    stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
            sync_directory(directory)
        except OSError:
            self.remove(batch_id, name)
            raise
        return Segment(name, digest.hexdigest(), sum(map(len, output)))

    def read(self, batch_id: str, segment: Segment) -> Iterator[tuple[bytes, bool]]:
        """Yield blocks of a segment, and whether they belong to the output file.

        Raises:
            ValueError: The content is not what was written. The blocks so far must be discarded.
        """
        digest = hashlib.sha256()
        try:
            with (self._directory / batch_id / segment.name).open("rb") as stream:
                left = segment.output_bytes
                while block := stream.read(min(_BLOCK, left) or _BLOCK):
                    digest.update(block)
                    yield block, left > 0
                    left = max(0, left - len(block))
        except FileNotFoundError as error:
            raise ValueError(f"the segment {segment.name} is missing") from error
        if digest.hexdigest() != segment.sha256:
            raise ValueError(f"the segment {segment.name} is damaged")

    def read_lines(self, batch_id: str, segment: Segment) -> dict[str, tuple[bytes, bool]]:
        """Return the lines of a segment, and whether they belong to the output file, by the ids of the lines.

        Raises:
            ValueError: The content is not what was written.
        """
        blocks: dict[bool, list[bytes]] = {True: [], False: []}
        for block, is_output in self.read(batch_id, segment):
            blocks[is_output].append(block)
        return {
            id_of_line(line): (line + b"\n", is_output)
            for is_output, parts in blocks.items()
            for line in b"".join(parts).split(b"\n")[:-1]
        }

    def size(self, batch_id: str) -> int:
        """Return the size of all segments of a batch."""
        return size_of(list_dir(self._directory / batch_id))

    def crash_log(self, batch_id: str, seq: int) -> CrashLog:
        """Open the log of a chunk."""
        directory = self._directory / batch_id
        directory.mkdir(parents=True, exist_ok=True)
        return CrashLog(directory / f"{seq:06d}.log")

    def remove(self, batch_id: str, *names: str) -> None:
        """Remove segments of a batch."""
        for name in names:
            (self._directory / batch_id / name).unlink(missing_ok=True)

    def remove_older(self, batch_id: str, seq: int, fence: int) -> None:
        """Remove what workers with earlier leases of a chunk may have left."""
        self.remove(batch_id, *(f"{seq:06d}.{older}.jsonl" for older in range(1, fence)))

    def remove_all(self, batch_id: str) -> None:
        """Remove all segments of a batch."""
        shutil.rmtree(self._directory / batch_id, ignore_errors=True)

    def remove_ended(self, unfinished: Callable[[], Iterable[str]]) -> set[str]:
        """Remove the segments of batches that have ended, which a worker without a lease can have written.

        Returns the batches that have not ended.
        """
        # Read before the table, so that a batch which begins meanwhile is not among them.
        found = {path.name for path in self._directory.iterdir()} if self._directory.exists() else set()
        existing = set(unfinished())
        for batch_id in found - existing:
            self.remove_all(batch_id)
        return existing


class CrashLog:
    """Lines of a chunk at which processes ended, so that a line that crashes the process is found. A context manager.

    The log survives a crash of the process, and need not survive one of the machine.
    """

    def __init__(self, path: Path) -> None:
        self._stream = path.open("a+b", buffering=0)
        self._stream.seek(0)
        self._crashes: Counter[int] = Counter()
        for entry in self._stream.read().split():
            with suppress(ValueError):  # an entry that a crash of the machine damaged
                self._crashes[int(entry[1:])] += 1 if entry.startswith(b"+") else -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    def crashes_at(self, number: int) -> int:
        """Return how many processes ended while they computed a line."""
        return self._crashes[number]

    @contextmanager
    def computing(self, number: int) -> Iterator[None]:
        """Record the line that is being computed."""
        self._stream.write(b"+%d\n" % number)
        try:
            yield
        finally:
            self._stream.write(b"-%d\n" % number)
