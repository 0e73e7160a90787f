"""Parts of the output: files that appear in the output directory when they are complete."""

from __future__ import annotations

import contextlib
import os
from contextlib import ExitStack
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, Final, Literal, Protocol

import numpy as np
import orjson

from emb_model_provider.errors import BulkError
from emb_model_provider.snapshots.locks import try_lock_exclusive

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from typing import BinaryIO

    from numpy.typing import NDArray

    from emb_model_provider.bulk.rows import Row

OutputFormat = Literal["parquet", "npy", "jsonl"]

WRITERS: Final[dict[OutputFormat, str]] = {
    "parquet": "parquet:ParquetPartWriter",
    "npy": "parts:NpyPartWriter",
    "jsonl": "parts:JsonLinesPartWriter",
}
"""Classes of this package that write parts."""


class PartWriter(Protocol):
    """Writes the vectors of a part into open files."""

    companions: ClassVar[Sequence[str]]
    """Endings of further files besides that of the format."""

    def __init__(self, files: Sequence[BinaryIO], width: int, *, has_ids: bool) -> None:
        """Begin a part whose vectors have `width` dimensions; `files` are that of the format, and the companions."""

    def write(self, numbers: NDArray[np.int64], ids: Sequence[str | int | None], vectors: NDArray[np.float32]) -> None:
        """Write rows: their numbers, their ids, and float32 of shape (rows, width)."""
        ...

    def close(self) -> None:
        """Write what remains. The files stay open."""
        ...


class NpyPartWriter:
    """Writes a matrix that `numpy.load` maps into memory, and the row numbers and ids in a file next to it."""

    companions = ("ids.jsonl",)

    def __init__(self, files: Sequence[BinaryIO], width: int, *, has_ids: bool) -> None:
        self._vectors, self._ids = files
        self._width = width
        self._has_ids = has_ids
        self._count = 0
        self._write_header()

    def write(self, numbers: NDArray[np.int64], ids: Sequence[str | int | None], vectors: NDArray[np.float32]) -> None:
        self._count += len(vectors)
        self._vectors.write(np.ascontiguousarray(vectors, dtype="<f4").data)
        rows = zip(numbers.tolist(), ids, strict=True)
        self._ids.writelines(
            orjson.dumps(_keys(*row, has_ids=self._has_ids), option=orjson.OPT_APPEND_NEWLINE) for row in rows
        )

    def close(self) -> None:
        # Its length does not depend on the number of rows, for which NumPy leaves space.
        self._vectors.seek(0)
        self._write_header()
        self._vectors.seek(0, os.SEEK_END)

    def _write_header(self) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (self._count, self._width)}
        np.lib.format.write_array_header_1_0(self._vectors, header)


class JsonLinesPartWriter:
    """Writes an object per row: row, id, embedding."""

    companions = ()

    def __init__(self, files: Sequence[BinaryIO], width: int, *, has_ids: bool) -> None:  # noqa: ARG002 - see PartWriter
        (self._file,) = files
        self._has_ids = has_ids

    def write(self, numbers: NDArray[np.int64], ids: Sequence[str | int | None], vectors: NDArray[np.float32]) -> None:
        option = orjson.OPT_APPEND_NEWLINE | orjson.OPT_SERIALIZE_NUMPY
        for number, identifier, vector in zip(numbers.tolist(), ids, vectors, strict=True):
            keys = _keys(number, identifier, has_ids=self._has_ids)
            self._file.write(orjson.dumps({**keys, "embedding": vector}, option=option))

    def close(self) -> None:
        pass


class Part:
    """A part that is being written. Its files get their names when it is complete, that of the format last.

    So a part exists if and only if the file of the format exists, whenever the process or the machine ends.
    """

    def __init__(self, directory: Path, index: int, output_format: OutputFormat, width: int, *, has_ids: bool) -> None:
        """Begin a part.

        Raises:
            BulkError: Another process is writing it.
        """
        self._directory = directory
        self._main = part_path(directory, index, output_format)
        self._errors = errors_path(directory, index)
        self._lock_path = directory / f".{self._main.stem}.lock"
        lock = try_lock_exclusive(self._lock_path)
        if lock is None:
            raise BulkError(
                f"Another process is writing {self._main}. Wait for it to end, or give each process a shard of its own: "
                "--shard 0/2 and --shard 1/2."
            )
        self._lock = lock
        self._open = ExitStack()
        self._files: dict[Path, BinaryIO] = {}
        cls = writer_class(output_format)
        paths = [self._main, *(self._main.with_suffix(f".{ending}") for ending in cls.companions)]
        try:
            self._writer = cls([self._create(path) for path in paths], width, has_ids=has_ids)
        except BaseException:
            self.discard()
            raise

    def write(self, rows: Sequence[Row], vectors: NDArray[np.float32]) -> None:
        """Write rows with their vectors; float32 of shape (rows, width)."""
        if rows:
            numbers = np.fromiter((row.number for row in rows), dtype=np.int64, count=len(rows))
            self._writer.write(numbers, [row.id for row in rows], vectors)

    def write_failed(self, row: Row, reason: str) -> None:
        """Write a row that has no vector."""
        file = self._files.get(self._errors) or self._create(self._errors)
        value = {"row": row.number, "id": row.id, "reason": reason}
        file.write(orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE))

    def commit(self) -> None:
        """Complete the part on disk."""
        self._writer.close()
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        self._open.close()
        self._errors.unlink(missing_ok=True)  # of an attempt without the file itself
        for path in sorted(self._files, key=lambda path: path == self._main):
            _temporary(path).replace(path)
        _fsync_directory(self._directory)
        self._lock_path.unlink(missing_ok=True)
        self._lock.release()

    def discard(self) -> None:
        """Remove what was written."""
        with contextlib.suppress(OSError, ValueError):  # a full disk refuses the buffered bytes again
            self._open.close()
        for path in self._files:
            with contextlib.suppress(OSError):
                _temporary(path).unlink()
        with contextlib.suppress(OSError):
            self._lock_path.unlink()
        self._lock.release()

    def _create(self, path: Path) -> BinaryIO:
        self._files[path] = file = self._open.enter_context(_temporary(path).open("wb"))
        return file


def writer_class(output_format: OutputFormat) -> type[PartWriter]:
    """Return the class that writes a format.

    Raises:
        InvalidBulkJobError: A package is missing.
    """
    module, _, name = WRITERS[output_format].partition(":")
    cls: type[PartWriter] = getattr(import_module(f"emb_model_provider.bulk.{module}"), name)
    return cls


def part_path(directory: Path, index: int, output_format: OutputFormat) -> Path:
    """Return the file of a part, which exists once the part is complete."""
    return directory / f"part-{index:05d}.{output_format}"


def errors_path(directory: Path, index: int) -> Path:
    """Return the file with the rows of a part that failed. It does not exist if all rows have vectors."""
    return directory / f"_errors-{index:05d}.jsonl"


def count_errors(directory: Path, index: int) -> int:
    """Return how many rows of a complete part have no vector."""
    try:
        with errors_path(directory, index).open("rb") as file:
            return sum(1 for _ in file)
    except FileNotFoundError:
        return 0


def _keys(number: int, identifier: str | int | None, *, has_ids: bool) -> dict[str, str | int | None]:
    return {"row": number, "id": identifier} if has_ids else {"row": number}


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _fsync_directory(directory: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
