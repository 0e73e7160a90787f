"""Inputs of bulk jobs in all formats, and what a job has written."""

from __future__ import annotations

import csv
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from emb_model_provider import Embedder
from emb_model_provider.bulk.job import BulkOptions, Counts, run_job
from emb_model_provider.bulk.rows import Columns
from emb_model_provider.progress import ignore_progress

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from emb_model_provider.settings import Settings

WORDS = ("the", "quick", "brown", "fox", "river", "apple", "stone", "light")


def texts(count: int) -> list[str]:
    """Return different texts of 1 to 40 words."""
    return [
        " ".join(WORDS[(index * 7 + place * place) % 8] for place in range(1 + index * 13 % 40)) + f" {index}"
        for index in range(count)
    ]


@dataclass(frozen=True)
class Written:
    """The content of an output directory."""

    numbers: list[int]
    ids: list[str | int | None]
    vectors: NDArray[np.float32]
    errors: list[dict[str, Any]]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write rows in the format of the name of a file."""
    match path.suffix:
        case ".jsonl":
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        case ".csv" | ".tsv":
            with path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]), delimiter="," if path.suffix == ".csv" else "\t")
                writer.writeheader()
                writer.writerows(rows)
        case _:
            pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=70)
    return path


def options(
    source: Path, out: Path, *, text: str = "text", identifier: str | None = "id", **values: Any
) -> BulkOptions:
    return BulkOptions(
        source=source, out=out, columns=Columns(text=text, id=identifier), **{"part_rows": 100, **values}
    )


def run(job: BulkOptions, settings: Settings, **model: Any) -> Counts:
    """Run a job with a model of its own, which it closes."""
    return run_job(job, lambda: Embedder(settings=settings, **model).load(), ignore_progress, lambda _: None)


def read(out: Path, output_format: str = "parquet") -> Written:
    """Read all parts of a directory, in their order."""
    numbers: list[int] = []
    ids: list[str | int | None] = []
    vectors: list[Any] = []
    for path in sorted(out.glob(f"part-*.{output_format}")):
        if path.name.endswith(".ids.jsonl"):
            continue
        if output_format == "parquet":
            table = pq.read_table(path)
            rows = table.drop_columns("embedding").to_pylist()
            width = table.schema.field("embedding").type.list_size
            flat = table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            vectors.append(np.asarray(flat, dtype=np.float32).reshape(-1, width))
        elif output_format == "npy":
            rows = json_lines(path.with_suffix(".ids.jsonl"))
            vectors.append(np.load(path, mmap_mode="r"))
        else:
            rows = json_lines(path)
            vectors.append(np.array([row["embedding"] for row in rows], dtype=np.float32))
        assert len(vectors[-1]) == len(rows)
        numbers += [row["row"] for row in rows]
        ids += [row.get("id") for row in rows]
    errors = [line for path in sorted(out.glob("_errors-*.jsonl")) for line in json_lines(path)]
    return Written(numbers, ids, np.concatenate(vectors), errors)


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files(out: Path) -> dict[str, bytes]:
    """Return the visible files of a directory, and check that no temporary file is left."""
    assert not [*out.glob(".*.tmp")]
    return {path.name: path.read_bytes() for path in sorted(out.iterdir()) if not path.name.startswith(".")}
