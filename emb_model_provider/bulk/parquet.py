"""Parquet: rows of files, and parts of vectors. The only module that imports pyarrow."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from emb_model_provider.bulk.rows import Row, Scan, check_first_rows, missing_column
from emb_model_provider.errors import InvalidBulkJobError
from emb_model_provider.formatting import first_line, quote
from emb_model_provider.snapshots.snapshot import hash_file

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise InvalidBulkJobError(
        f"Parquet needs pyarrow ({first_line(error)}). Install it: pip install 'emb-model-provider[parquet]', or pip install "
        "pyarrow. Or use another format: --format npy or --format jsonl, and an input in JSON Lines or CSV."
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from typing import BinaryIO

    import numpy as np
    from numpy.typing import NDArray

    from emb_model_provider.bulk.rows import Columns

_READ_ROWS = 2048
_BUFFER_BYTES = 2**20
"""Read at once of each column. Without it, pyarrow holds a whole row group in memory."""


class ParquetReader:
    """Reads two columns of a file."""

    def __init__(self, path: Path, columns: Columns) -> None:
        self._path = path
        self._columns = columns
        with self._open() as file:
            self._groups = [file.metadata.row_group(index).num_rows for index in range(file.num_row_groups)]
            schema = file.schema_arrow
        self._check_type(schema, columns.text, "--text-column", _is_text, "text (string)")
        if columns.id is not None:
            self._check_type(schema, columns.id, "--id-column", _is_id, "text (string) or integers")

    def scan(self, part_rows: int, on_bytes: Callable[[int], None]) -> Scan:  # noqa: ARG002 - see Reader
        hashes = hash_file(self._path)
        on_bytes(hashes.size)
        return Scan(hashes.sha256, sum(self._groups), ())

    def rows(self, start: int, scan: Scan, part_rows: int) -> Iterator[Row]:  # noqa: ARG002 - likewise
        return self._rows(start * part_rows)

    def check(self) -> None:
        check_first_rows(self._path, self._rows(0))

    def _rows(self, first: int) -> Iterator[Row]:
        number = group = 0
        while group < len(self._groups) and number + self._groups[group] <= first:
            number += self._groups[group]
            group += 1
        text, identifier = self._columns.text, self._columns.id
        names = list(dict.fromkeys(name for name in (text, identifier) if name is not None))
        try:
            with self._open() as file:
                groups = list(range(group, len(self._groups)))
                for batch in file.iter_batches(_READ_ROWS, row_groups=groups, columns=names):
                    if number + len(batch) > first:
                        offset = max(0, first - number)
                        texts = _values(batch.column(text).slice(offset))
                        ids = itertools.repeat(None) if identifier is None else _values(batch.column(identifier).slice(offset))  # fmt: skip
                        for index, (value, own) in enumerate(zip(texts, ids, strict=False), number + offset):
                            yield self._row(index, value, own)
                    number += len(batch)
        except pa.ArrowException as error:
            raise InvalidBulkJobError(
                f"{self._path} cannot be read: {first_line(error)}. Write the file again."
            ) from error

    def _row(self, number: int, text: Any, identifier: Any) -> Row:
        if self._columns.id is not None and type(identifier) not in (str, int):
            return Row(number, None, "", _wrong_value(self._columns.id, identifier))
        if type(text) is not str:
            return Row(number, identifier, "", _wrong_value(self._columns.text, text))
        return Row(number, identifier, text)

    def _open(self) -> Any:
        try:
            return pq.ParquetFile(self._path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        except pa.ArrowException as error:
            raise InvalidBulkJobError(f"{self._path} is not a valid Parquet file: {first_line(error)}.") from error

    def _check_type(
        self, schema: Any, name: str, option: str, is_allowed: Callable[[Any], bool], expected: str
    ) -> None:
        positions = schema.get_all_field_indices(name)
        if not positions:
            raise missing_column(self._path, name, schema.names, option)
        if len(positions) > 1:
            raise InvalidBulkJobError(f"{self._path} has {len(positions)} columns {quote(name)}. Rename them.")
        kind = schema.field(name).type
        if not is_allowed(kind.value_type if pa.types.is_dictionary(kind) else kind):
            raise InvalidBulkJobError(
                f"The column {quote(name)} of {self._path} has the type {kind}, and must have {expected}. Convert it, or choose "
                f"another column with {option}."
            )


class ParquetPartWriter:
    """Writes row numbers, ids and vectors: `row` int64, `id` string, `embedding` fixed-size list of float32."""

    companions = ()

    def __init__(self, files: Sequence[BinaryIO], width: int, *, has_ids: bool) -> None:
        self._width = width
        self._has_ids = has_ids
        fields = [pa.field("row", pa.int64(), nullable=False)]
        if has_ids:
            fields.append(pa.field("id", pa.string(), nullable=False))
        fields.append(
            pa.field("embedding", pa.list_(pa.field("element", pa.float32(), nullable=False), width), nullable=False)
        )
        self._schema = pa.schema(fields)
        # The bits of vectors are as good as random: neither a dictionary nor compression makes them smaller.
        self._writer = pq.ParquetWriter(
            files[0], self._schema, use_dictionary=False, compression="NONE", write_statistics=["row"]
        )

    def write(self, numbers: NDArray[np.int64], ids: Sequence[str | int | None], vectors: NDArray[np.float32]) -> None:
        values = pa.array(vectors.reshape(-1))
        columns = [
            pa.array(numbers),
            *([pa.array([str(each) for each in ids], pa.string())] if self._has_ids else ()),
            pa.FixedSizeListArray.from_arrays(values, type=self._schema.field("embedding").type),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=self._schema))

    def close(self) -> None:
        self._writer.close()


def _is_text(kind: Any) -> bool:
    types = pa.types
    return bool(
        types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind) or types.is_null(kind)
    )


def _is_id(kind: Any) -> bool:
    return _is_text(kind) or bool(pa.types.is_integer(kind))


def _values(column: Any) -> list[Any]:
    """Return the values of a column; bytes in place of text that is not valid UTF-8."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        values = [_value(each) for each in column]
    return values


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return error.object


def _wrong_value(column: str, value: Any) -> str:
    return f"{quote(column)} is null" if value is None else f"the value of {quote(column)} is not valid UTF-8"
