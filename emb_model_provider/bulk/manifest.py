"""What a job is: its input, model and options. It is kept in the output directory, so that no other job continues it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from emb_model_provider.bulk.rows import Scan
from emb_model_provider.errors import InvalidBulkJobError
from emb_model_provider.formatting import quote
from emb_model_provider.progress import Progress
from emb_model_provider.snapshots.files import write_atomically
from emb_model_provider.snapshots.locks import lock_exclusive

if TYPE_CHECKING:
    from pathlib import Path

    from emb_model_provider.bulk.rows import Reader
    from emb_model_provider.progress import OnProgress

MANIFEST: Final = "_manifest.json"
"""Readers of datasets, such as pyarrow and Spark, skip files whose names begin with `_` or a period."""
_LOCK = ".manifest.lock"
_SCAN = ".scan.json"
"""Keeps the scan of the input, because hashing it again for each shard and each start would take long."""
_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class InputManifest:
    """The part of a manifest that is known before a model is loaded."""

    input_sha256: str
    rows: int
    text_column: str
    id_column: str | None
    format: str
    part_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest(InputManifest):
    """Everything on which the vectors and the files depend."""

    model: str
    """Not compared, because a directory can be moved, and both hubs have the same models."""
    model_sha256: str
    backend: str
    precision: str
    prompt: str
    truncate: str | None
    dimensions: int


def check_input(directory: Path, manifest: InputManifest) -> None:
    """Raise InvalidBulkJobError if the directory belongs to a job with another input or other options."""
    if (found := _read(directory)) is not None:
        _compare(directory, found, manifest)


def check_or_write(directory: Path, manifest: Manifest) -> None:
    """Write the manifest into a directory without one; raise InvalidBulkJobError if the directory has a different one."""
    with lock_exclusive(directory / _LOCK):  # shards start at the same moment
        if (found := _read(directory)) is not None:
            _compare(directory, found, manifest)
            return
        content = {"version": _VERSION, **asdict(manifest)}
        write_atomically(directory / MANIFEST, json.dumps(content, indent=1, ensure_ascii=False).encode())


def scan_input(path: Path, reader: Reader, part_rows: int, directory: Path, on_progress: OnProgress) -> Scan:
    """Return the scan of an input, from the output directory if the file has not changed since."""
    stat = path.stat()
    key = {"version": _VERSION, "size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "part_rows": part_rows}
    kept = directory / _SCAN
    try:
        content = json.loads(kept.read_bytes())
        if content.pop("key") == key:
            return Scan(content["sha256"], content["rows"], tuple(content["offsets"]))
    except (OSError, ValueError, KeyError, TypeError):
        pass  # there is none, or it is damaged
    scan = reader.scan(part_rows, lambda done: on_progress(Progress("verify", path.name, done, stat.st_size)))
    write_atomically(kept, json.dumps({"key": key, **asdict(scan)}).encode())
    return scan


def _read(directory: Path) -> dict[str, Any] | None:
    path = directory / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InvalidBulkJobError(
            f"{path} cannot be read: {error}. Choose another --out, or delete {directory}."
        ) from error
    if not isinstance(content, dict) or content.pop("version", None) != _VERSION:
        raise InvalidBulkJobError(
            f"{path} was written by another version. Choose another --out, or delete {directory}."
        )
    return content


def _compare(directory: Path, found: dict[str, Any], manifest: InputManifest) -> None:
    differing = [
        f"{field.name} is {quote(found.get(field.name))} there and {quote(getattr(manifest, field.name))} here"
        for field in fields(manifest)
        if field.name != "model" and found.get(field.name) != getattr(manifest, field.name)
    ]
    if differing:
        raise InvalidBulkJobError(
            f"{directory} contains the vectors of another job: {'; '.join(differing)}. To continue that job, use its input, "
            f"model and options, which are in {directory / MANIFEST}. To start this one, choose another --out, or delete "
            f"{directory}."
        )
