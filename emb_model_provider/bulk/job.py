"""A bulk job: it reads rows in windows, embeds them in the order of their lengths, and writes parts in the order of the rows.

Memory is bounded by the windows in progress, whatever the size of the input. A part contains the rows of a fixed range,
so that parts do not depend on interruptions or on the number of shards.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from emb_model_provider.bulk.manifest import InputManifest, Manifest, check_input, check_or_write, scan_input
from emb_model_provider.bulk.parts import Part, count_errors, part_path, writer_class
from emb_model_provider.bulk.rows import Columns, open_reader
from emb_model_provider.errors import (
    BulkError,
    DeviceLostError,
    InferenceError,
    InputTooLongError,
    InvalidBulkJobError,
    ProviderError,
    TextTooLongError,
)
from emb_model_provider.snapshots.files import is_disk_full, require_writable

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future
    from pathlib import Path

    from numpy.typing import NDArray

    from emb_model_provider.bulk.parts import OutputFormat
    from emb_model_provider.bulk.rows import Reader, Row, Scan
    from emb_model_provider.embedder import Embedder
    from emb_model_provider.model_spec import Truncate
    from emb_model_provider.progress import OnProgress
    from emb_model_provider.serving.results import Embeddings

_WINDOW_ROWS = 8192
_WINDOW_CHARACTERS = 2**21
"""A window ends at either. Many batches fit into it, so that the texts of a batch have nearly the same length."""
_CHUNK_ROWS = 1024
"""Texts of one call of the engine."""
_WINDOWS = 2
"""Windows that the model has while the next one is read, so that it never waits."""


@dataclass(frozen=True, slots=True)
class Shard:
    """The part of a job that this process does: the `index`-th of `count` ranges of parts."""

    index: int = 0
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class BulkOptions:
    """A job. None selects the default of the model."""

    source: Path
    """A file in JSON Lines, CSV or Parquet."""
    out: Path
    columns: Columns
    format: OutputFormat = "parquet"
    shard: Shard = field(default_factory=Shard)
    part_rows: int = 50_000
    """Rows of the input for each part. At most one part in progress is lost when the process is killed."""
    dimensions: int | None = None
    input_type: str | None = None
    truncate: Truncate | None = None


@dataclass(slots=True)
class Counts:
    """How far a shard has come."""

    total_rows: int
    done_rows: int
    """Rows with a vector or an error. Those of earlier runs are included."""
    failed_rows: int
    resumed_rows: int
    """Of `done_rows`, those of earlier runs."""
    total_parts: int
    tokens: int = 0
    """Processed by this run."""


def run_job(
    options: BulkOptions, load: Callable[[], Embedder], on_progress: OnProgress, on_counts: Callable[[Counts], None]
) -> Counts:
    """Embed the rows of a shard that have no vectors yet.

    Args:
        options: The job.
        load: Loads the model. Called once the input has been checked.
        on_progress: Called while the input is hashed.
        on_counts: Called before the first row, and after each thousand of rows.

    Returns:
        The state at the end.

    Raises:
        InvalidBulkJobError: The input cannot be read, or the output directory belongs to another job.
        BulkError: The disk is full, the input has changed, or another process does the same.
        ProviderError: The model cannot be loaded, does not support an option, or has failed.
    """
    try:
        return _Job(options).run(load, on_progress, on_counts)
    except OSError as error:
        if is_disk_full(error):
            raise BulkError(
                f"No space left in {options.out} ({error.strerror}). Free some space and run the same command again: the parts "
                "that are complete are kept."
            ) from error
        raise


class _Window:
    """Consecutive rows of a part, which the model embeds together."""

    def __init__(self, part: int, rows: list[Row], *, is_last: bool) -> None:
        self.part = part
        self.rows = rows
        self.is_last = is_last
        """Whether it is the last one of its part."""
        self._chunks: list[tuple[list[int], Future[Embeddings]]] = []

    def submit(self, embed: Callable[[list[str]], Future[Embeddings]]) -> None:
        """Queue the texts, in the order of their lengths."""
        rows = self.rows
        usable = [index for index, row in enumerate(rows) if row.reason is None]
        usable.sort(key=lambda index: len(rows[index].text))
        for start in range(0, len(usable), _CHUNK_ROWS):
            chunk = usable[start : start + _CHUNK_ROWS]
            self._chunks.append((chunk, embed([rows[index].text for index in chunk])))

    def chunks(self) -> Iterator[tuple[list[int], Future[Embeddings]]]:
        """Yield the indices of the rows of each chunk, and the future of their vectors."""
        yield from self._chunks

    def cancel(self) -> None:
        for _, future in self._chunks:
            future.cancel()


class _Job:
    def __init__(self, options: BulkOptions) -> None:
        self._options = options
        self._part: Part | None = None
        self._counts: Counts
        self._on_counts: Callable[[Counts], None]

    def run(self, load: Callable[[], Embedder], on_progress: OnProgress, on_counts: Callable[[Counts], None]) -> Counts:
        options = self._options
        reader = open_reader(options.source, options.columns)
        writer_class(options.format)
        reader.check()
        require_writable(options.out, "--out")
        before = options.source.stat()
        scan = scan_input(options.source, reader, options.part_rows, options.out, on_progress)
        input_manifest = InputManifest(
            input_sha256=scan.sha256,
            rows=scan.rows,
            text_column=options.columns.text,
            id_column=options.columns.id,
            format=options.format,
            part_rows=options.part_rows,
        )
        check_input(options.out, input_manifest)
        self._begin(scan, on_counts)
        with load() as embedder:
            manifest = self._complete(input_manifest, embedder)
            check_or_write(options.out, manifest)
            self._on_counts(self._counts)
            self._embed_rows(embedder, reader, scan, manifest.dimensions, before)
        return self._counts

    def _begin(self, scan: Scan, on_counts: Callable[[Counts], None]) -> None:
        options, part_rows = self._options, self._options.part_rows
        parts = -(-scan.rows // part_rows)
        shard = options.shard
        first, end = shard.index * parts // shard.count, (shard.index + 1) * parts // shard.count
        self._sizes = {part: min(part_rows, scan.rows - part * part_rows) for part in range(first, end)}
        done = [part for part in self._sizes if part_path(options.out, part, options.format).exists()]
        done_rows = sum(self._sizes[part] for part in done)
        self._missing = [part for part in self._sizes if part not in set(done)]
        self._on_counts = on_counts
        self._counts = Counts(
            total_rows=sum(self._sizes.values()),
            done_rows=done_rows,
            failed_rows=sum(count_errors(options.out, part) for part in done),
            resumed_rows=done_rows,
            total_parts=len(self._sizes),
        )

    def _complete(self, manifest: InputManifest, embedder: Embedder) -> Manifest:
        """Return the manifest with the model. One text is embedded, so that a wrong option fails before any row."""
        options = self._options
        probe = embedder.embed(
            ["a"], dimensions=options.dimensions, input_type=options.input_type, truncate=options.truncate
        )
        description = embedder.description
        return Manifest(
            **{name: getattr(manifest, name) for name in InputManifest.__slots__},
            model=embedder.spec.name,
            model_sha256=embedder.digest,
            backend=description.backend,
            precision=description.precision,
            prompt=embedder.prompt(options.input_type),
            truncate=options.truncate or embedder.spec.truncate,
            dimensions=probe.shape[1],
        )

    def _embed_rows(self, embedder: Embedder, reader: Reader, scan: Scan, width: int, before: os.stat_result) -> None:
        options = self._options

        def embed(texts: list[str]) -> Future[Embeddings]:
            return embedder.submit(
                texts, dimensions=options.dimensions, input_type=options.input_type, truncate=options.truncate
            )

        pending: deque[_Window] = deque()

        def finish() -> None:
            window = pending[0]
            self._write(window, width, embed)
            if window.is_last:
                self._check_input(before)
            pending.popleft()
            if window.is_last and self._part is not None:
                self._part.commit()
                self._part = None

        try:
            for window in self._windows(reader, scan):
                window.submit(embed)
                pending.append(window)
                if len(pending) > _WINDOWS:
                    finish()
            while pending:
                finish()
        except BaseException:
            for window in pending:
                window.cancel()
            if self._part is not None:
                self._part.discard()
            raise

    def _windows(self, reader: Reader, scan: Scan) -> Iterator[_Window]:
        """Yield the rows of the missing parts. A window does not depend on what is missing."""
        rows: Iterator[Row] = iter(())
        previous = None
        for part in self._missing:
            if previous is None or part != previous + 1:
                rows = reader.rows(part, scan, self._options.part_rows)
            previous = part
            remaining = self._sizes[part]
            while remaining:
                members: list[Row] = []
                characters = 0
                for row in rows:
                    members.append(row)
                    characters += len(row.text)
                    if len(members) == min(_WINDOW_ROWS, remaining) or characters >= _WINDOW_CHARACTERS:
                        break
                else:
                    self._raise_changed()
                remaining -= len(members)
                yield _Window(part, members, is_last=not remaining)

    def _write(self, window: _Window, width: int, embed: Callable[[list[str]], Future[Embeddings]]) -> None:
        """Wait for the vectors of a window, and write them in the order of its rows."""
        vectors = np.empty((len(window.rows), width), dtype=np.float32)
        reasons: dict[int, str] = {index: row.reason for index, row in enumerate(window.rows) if row.reason is not None}
        counts = self._counts
        counts.done_rows += len(reasons)
        for indices, future in window.chunks():
            for done, result in self._results(indices, future, window.rows, embed):
                if isinstance(result, str):
                    reasons[done[0]] = result
                else:
                    vectors[done] = result
            counts.done_rows += len(indices)
            self._on_counts(counts)
        counts.failed_rows += len(reasons)
        if self._part is None:
            has_ids = self._options.columns.id is not None
            self._part = Part(self._options.out, window.part, self._options.format, width, has_ids=has_ids)
        if reasons:
            for index in sorted(reasons):
                self._part.write_failed(window.rows[index], reasons[index])
            kept = [index for index in range(len(window.rows)) if index not in reasons]
            self._part.write([window.rows[index] for index in kept], vectors[kept])
        else:
            self._part.write(window.rows, vectors)

    def _results(
        self,
        indices: list[int],
        future: Future[Embeddings],
        rows: Sequence[Row],
        embed: Callable[[list[str]], Future[Embeddings]],
    ) -> Iterator[tuple[list[int], NDArray[np.float32] | str]]:
        """Yield the vectors of rows, or the reason why one row has none: a chunk that fails is halved to find it."""
        try:
            embeddings = future.result()
        except (InputTooLongError, TextTooLongError, InferenceError) as error:
            if isinstance(error, DeviceLostError):
                raise
            if len(indices) == 1:
                yield indices, _reason(error)
                return
            middle = len(indices) // 2
            for half in (indices[:middle], indices[middle:]):
                yield from self._results(half, embed([rows[index].text for index in half]), rows, embed)
        else:
            self._counts.tokens += embeddings.tokens
            yield indices, embeddings.vectors

    def _check_input(self, before: os.stat_result) -> None:
        now = self._options.source.stat()
        if (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            self._raise_changed()

    def _raise_changed(self) -> None:
        raise InvalidBulkJobError(
            f"The input {self._options.source} has changed during the job. Restore it and run the same command again, or start "
            "with another --out."
        )


def _reason(error: ProviderError) -> str:
    match error:
        case InputTooLongError():
            return f"the text has more than {error.max_length} tokens"
        case TextTooLongError():
            return f"the text has {error.characters} characters, and the tokenizer reads up to {error.limit}"
    return error.message
