"""Rows of JSON Lines and CSV files, and the scan that counts and hashes the rows of any input.

A row that cannot be embedded is returned with the reason, because one bad row must not end a job of hours. What would
make all rows unusable, such as a missing column, raises InvalidBulkJobError before a model is loaded.
"""

from __future__ import annotations

import codecs
import csv
import difflib
import hashlib
import io
import itertools
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import orjson

from emb_model_provider.errors import InvalidBulkJobError
from emb_model_provider.formatting import format_size, quote

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path
    from typing import BinaryIO

READERS: Final = {
    ".jsonl": "rows:JsonLinesReader",
    ".ndjson": "rows:JsonLinesReader",
    ".csv": "rows:CsvReader",
    ".tsv": "rows:CsvReader",
    ".parquet": "parquet:ParquetReader",
}
"""Classes of this package that read files with these endings."""

_MAX_LINE = 32 * 2**20
"""Longest line of JSON Lines, and longest field of CSV, in bytes: it bounds memory where a line break or a quote is missing."""
_BUFFER_BYTES = 2**20
_CHECKED_ROWS = 100
"""Rows of which one must be usable, else the columns are wrong."""
_SHOWN_COLUMNS = 20


class Row(NamedTuple):
    """A row of the input."""

    number: int
    """Its position in the input, from 0. Empty lines and the header are not counted."""
    id: str | int | None
    """None without an id column, and for a row whose id is missing or invalid."""
    text: str
    reason: str | None = None
    """Why the row cannot be embedded. None: it can."""


@dataclass(frozen=True, slots=True)
class Scan:
    """The rows of an input, counted and hashed."""

    sha256: str
    rows: int
    offsets: tuple[int, ...]
    """Of a text file, the position of the first row of each part in bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The columns that are read."""

    text: str
    id: str | None


class Reader(Protocol):
    """Reads one file, which must not change meanwhile."""

    def scan(self, part_rows: int, on_bytes: Callable[[int], None]) -> Scan:
        """Count and hash the rows. `on_bytes` gets the number of bytes read so far."""
        ...

    def rows(self, start: int, scan: Scan, part_rows: int) -> Iterator[Row]:
        """Yield the rows from the first one of part `start` on."""
        ...

    def check(self) -> None:
        """Raise InvalidBulkJobError if the file does not have the columns, or none of its first rows can be embedded."""
        ...


def open_reader(path: Path, columns: Columns) -> Reader:
    """Return the reader for a file, by the ending of its name.

    Raises:
        InvalidBulkJobError: The file does not exist, or the ending is unknown.
    """
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "does not exist or is not a file"
        raise InvalidBulkJobError(f"The input {path} {what}. Pass one file: {', '.join(READERS)}.")
    target = READERS.get(path.suffix.lower())
    if target is None:
        raise InvalidBulkJobError(
            f"The input {path} has an unknown format. Supported endings: {', '.join(READERS)}. Rename or convert the file."
        )
    module, _, name = target.partition(":")
    reader: Reader = getattr(import_module(f"emb_model_provider.bulk.{module}"), name)(path, columns)
    return reader


def check_first_rows(path: Path, rows: Iterator[Row]) -> None:
    """Raise InvalidBulkJobError if there are rows and none of the first ones can be embedded."""
    first = list(itertools.islice(rows, _CHECKED_ROWS))
    if first and all(row.reason is not None for row in first):
        raise InvalidBulkJobError(
            f"None of the first {len(first)} rows of {path} can be embedded. Row 0: {first[0].reason}. Correct the file, or "
            "choose other columns with --text-column and --id-column."
        )


def missing_column(path: Path, name: str, columns: Sequence[str], option: str) -> InvalidBulkJobError:
    """Return the error of a file that does not have a column, with the columns that it has."""
    shown = ", ".join(map(quote, columns[:_SHOWN_COLUMNS])) + (", …" if len(columns) > _SHOWN_COLUMNS else "")
    similar = difflib.get_close_matches(name, columns, n=1)
    meant = f" Did you mean {quote(similar[0])}?" if similar else ""
    return InvalidBulkJobError(
        f"{path} has no column {quote(name)}. Its columns: {shown or 'none'}. Choose one with {option}.{meant}"
    )


class _Lines:
    """The lines of a file with their line breaks, and the position after the last one that was returned."""

    def __init__(self, file: BinaryIO, path: Path, position: int = 0) -> None:
        self._file = file
        self._path = path
        self.position = position

    def __iter__(self) -> Iterator[bytes]:
        for line in iter(partial(self._file.readline, _MAX_LINE), b""):
            start, self.position = self.position, self.position + len(line)
            if len(line) == _MAX_LINE and not line.endswith(b"\n"):
                raise InvalidBulkJobError(
                    f"{self._path} has a line of more than {format_size(_MAX_LINE)} at byte {start}. Is it a file with one "
                    "row per line? Convert it, or shorten the text."
                )
            yield line.removeprefix(codecs.BOM_UTF8) if start == 0 else line


class _TextReader:
    """A file whose rows are found by reading lines."""

    def __init__(self, path: Path, columns: Columns) -> None:
        self._path = path
        self._columns = columns
        with path.open("rb") as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise InvalidBulkJobError(
                    f"{path} is encoded as UTF-16. Convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW_FILE"
                )

    def scan(self, part_rows: int, on_bytes: Callable[[int], None]) -> Scan:
        digest = hashlib.sha256()
        with _HashedFile(self._path, digest.update, on_bytes) as raw, io.BufferedReader(raw, _BUFFER_BYTES) as file:
            lines = _Lines(file, self._path)
            records = self._records(lines)
            offsets: list[int] = []
            count, start = 0, lines.position
            for count, _ in enumerate(records, 1):
                if count % part_rows == 1 or part_rows == 1:
                    offsets.append(start)
                last, start = start, lines.position
        if count:
            self._check_last(last)
        return Scan(digest.hexdigest(), count, tuple(offsets))

    def rows(self, start: int, scan: Scan, part_rows: int) -> Iterator[Row]:
        with self._path.open("rb", buffering=_BUFFER_BYTES) as file:
            file.seek(scan.offsets[start])
            records = self._records(_Lines(file, self._path, scan.offsets[start]))
            for number, record in enumerate(records, start * part_rows):
                yield self._row(number, record)

    def check(self) -> None:
        with self._path.open("rb") as file:
            rows = (self._row(*each) for each in enumerate(self._records(_Lines(file, self._path))))
            check_first_rows(self._path, rows)

    def _records(self, lines: _Lines) -> Iterator[Any]:
        raise NotImplementedError

    def _row(self, number: int, record: Any) -> Row:
        raise NotImplementedError

    def _check_last(self, offset: int) -> None:
        """Raise InvalidBulkJobError if the last record, which begins at `offset`, is incomplete."""


class _HashedFile(io.FileIO):
    """A file whose bytes are hashed while they are read."""

    def __init__(self, path: Path, update: Callable[[memoryview], None], on_bytes: Callable[[int], None]) -> None:
        super().__init__(path)
        self._update = update
        self._on_bytes = on_bytes
        self._done = 0

    def readinto(self, buffer: Any) -> int:
        count = super().readinto(buffer) or 0
        self._update(memoryview(buffer)[:count])
        self._done += count
        self._on_bytes(self._done)
        return count


class JsonLinesReader(_TextReader):
    """Reads a JSON object per line."""

    def check(self) -> None:
        names: dict[str, None] = {}
        with self._path.open("rb") as file:
            for line in itertools.islice(self._records(_Lines(file, self._path)), _CHECKED_ROWS):
                try:
                    names |= dict.fromkeys(orjson.loads(line))
                except (orjson.JSONDecodeError, TypeError):
                    continue
        for name, option in ((self._columns.text, "--text-column"), (self._columns.id, "--id-column")):
            if names and name is not None and name not in names:
                raise missing_column(self._path, name, list(names), option)
        super().check()

    def _records(self, lines: _Lines) -> Iterator[bytes]:
        return (line for line in lines if line not in (b"\n", b"\r\n", b""))

    def _row(self, number: int, record: bytes) -> Row:
        try:
            value = orjson.loads(record)
        except orjson.JSONDecodeError as error:
            return Row(number, None, "", f"it is not valid JSON: {error}")
        if not isinstance(value, dict):
            return Row(number, None, "", "it is not a JSON object")
        identifier: str | int | None = None
        if (column := self._columns.id) is not None:
            identifier = value.get(column)
            if type(identifier) not in (str, int):
                return Row(number, None, "", _wrong_value(column, value, "a string or an integer"))
        text = value.get(self._columns.text)
        if type(text) is not str:
            return Row(number, identifier, "", _wrong_value(self._columns.text, value, "a string"))
        return Row(number, identifier, text)


class CsvReader(_TextReader):
    """Reads CSV with a header, as Excel writes it, or values separated by tabs."""

    def __init__(self, path: Path, columns: Columns) -> None:
        super().__init__(path, columns)
        # A setting of the module. The default, 128 KiB, is less than a long text.
        csv.field_size_limit(_MAX_LINE)
        self._delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
        self._text, self._id = self._positions()

    def _positions(self) -> tuple[int, int | None]:
        """Return where the columns are."""
        with self._path.open("rb") as file:
            header: list[str] = next(filter(None, self._parsed(_decoded(_Lines(file, self._path)))), [])
        if not all(map(_is_valid, header)):
            raise InvalidBulkJobError(
                f"The header of {self._path} is not valid UTF-8. Convert the file, for example: iconv -f GB18030 -t UTF-8 "
                "FILE > NEW_FILE"
            )

        def position(name: str, option: str) -> int:
            if header.count(name) > 1:
                raise InvalidBulkJobError(f"{self._path} has {header.count(name)} columns {quote(name)}. Rename them.")
            if name not in header:
                raise missing_column(self._path, name, header, option)
            return header.index(name)

        text, identifier = self._columns.text, self._columns.id
        return position(text, "--text-column"), None if identifier is None else position(identifier, "--id-column")

    def _parsed(self, lines: Iterable[str]) -> Iterator[list[str]]:
        records = csv.reader(lines, delimiter=self._delimiter)
        try:
            yield from records
        except csv.Error as error:
            raise InvalidBulkJobError(
                f"{self._path} is not valid CSV near line {records.line_num}: {error}. Is a quote not closed? Correct the file."
            ) from error

    def _records(self, lines: _Lines) -> Iterator[list[str]]:
        is_start = lines.position == 0
        records = filter(None, self._parsed(_decoded(lines)))
        if is_start:
            next(records)  # the header
        return records

    def _check_last(self, offset: int) -> None:
        with self._path.open("rb") as file:
            file.seek(offset)
            try:
                # Else a quote that is not closed would make one row of the rest of the file.
                for _ in csv.reader(_decoded(file), delimiter=self._delimiter, strict=True):
                    pass
            except csv.Error as error:
                if "unexpected end" in str(error):
                    raise InvalidBulkJobError(
                        f"{self._path} has a quote that is not closed in the row at byte {offset}. Correct the file."
                    ) from error

    def _row(self, number: int, record: list[str]) -> Row:
        identifier: str | None = None
        if self._id is not None:
            if self._id >= len(record) or not record[self._id]:
                return Row(number, None, "", f"it has no value in the column {quote(self._columns.id)}")
            identifier = record[self._id]
            if not _is_valid(identifier):
                return Row(number, None, "", f"the value of {quote(self._columns.id)} is not valid UTF-8")
        if self._text >= len(record):
            return Row(number, identifier, "", f"it has {len(record)} values, and no value in the column {quote(self._columns.text)}")  # fmt: skip
        text = record[self._text]
        if not _is_valid(text):
            return Row(number, identifier, "", f"the value of {quote(self._columns.text)} is not valid UTF-8")
        return Row(number, identifier, text)


def _decoded(lines: Iterable[bytes]) -> Iterator[str]:
    """Decode lines, with surrogates in place of invalid bytes, so that only the row with them is refused."""
    return (line.decode("utf-8", "surrogateescape") for line in lines)


def _is_valid(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _wrong_value(column: str, row: dict[str, Any], expected: str) -> str:
    if column not in row:
        return f"it has no column {quote(column)}"
    value = row[column]
    return f"{quote(column)} is null" if value is None else f"{quote(column)} is {quote(value)}, not {expected}"
