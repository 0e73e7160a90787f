"""`emb-provider embed`: vectors without a server, of texts on stdout, or of a file in files."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, get_args

import click
from click.core import ParameterSource

from emb_model_provider.cli import options
from emb_model_provider.cli.bulk import ShardRange, embed_file
from emb_model_provider.cli.interrupt import run_until_interrupted
from emb_model_provider.cli.output import out as print_line
from emb_model_provider.cli.output import say, show_progress
from emb_model_provider.model_spec import Truncate
from emb_model_provider.progress import Mode, Progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emb_model_provider.bulk.job import Shard
    from emb_model_provider.bulk.parts import OutputFormat
    from emb_model_provider.embedder import Embedder
    from emb_model_provider.model_spec import Precision, Source


class _Request(TypedDict):
    """Arguments of `Embedder.embed`."""

    input_type: str | None
    dimensions: int | None
    truncate: Truncate | None


_BATCH_SIZE = 256
"""Texts that are read before their vectors are printed. It bounds the memory that a long file takes."""


_FILE_OPTIONS = ("text_column", "id_column", "output_format", "shard", "part_rows")
"""Parameters that need --out."""


@click.command()
@click.argument("texts", nargs=-1, required=True, metavar="TEXT|-|@FILE|IN...")
@click.option("--model", "-m", type=options.ModelId(), help="Model to use. Default: the first model of the settings.")
@options.source
@options.revision
@options.precision
@click.option("--input-type", metavar="NAME", help="Prompt before each text, such as query or document.")
@click.option("--dimensions", type=click.IntRange(1), help="Size of the vectors, if the model supports smaller ones.")
@click.option(
    "--truncate",
    type=click.Choice(get_args(Truncate)),
    help="Side from which long texts are cut; NONE refuses them. Default: as configured.",
)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Embed the file IN into this directory.")
@click.option("--text-column", default="text", show_default=True, help="With --out: column of the texts.")
@click.option("--id-column", help="With --out: column of ids, which are copied. Without it, rows have only numbers.")
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["parquet", "npy", "jsonl"]),
    default="parquet",
    show_default=True,
    help="With --out: format of the vectors.",
)
@click.option(
    "--shard", type=ShardRange(), default="0/1", help="With --out: embed only the I-th of N ranges of rows, from 0."
)
@click.option(
    "--part-rows", type=click.IntRange(1), default=50_000, show_default=True, help="With --out: rows of each file."
)
@options.progress
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print JSON: one object per line: index, text, embedding; with --out one object: rows, failed_rows, parts.",
)
@click.pass_context
def embed(
    ctx: click.Context,
    texts: tuple[str, ...],
    model: str | None,
    source: Source | None,
    revision: str | None,
    precision: Precision | None,
    input_type: str | None,
    dimensions: int | None,
    truncate: Truncate | None,
    out: Path | None,
    text_column: str,
    id_column: str | None,
    output_format: OutputFormat,
    shard: Shard,
    part_rows: int,
    progress: Mode,
    *,
    as_json: bool,
) -> None:
    """Print the vectors of texts, or write those of a file.

    Each vector is a JSON array on one line. `-` reads texts from stdin and `@FILE` from a file, one per line. The model
    is downloaded and compiled if necessary, and runs in this process: no server is used.

    With --out, IN is one file of any size, in JSON Lines (.jsonl), CSV (.csv) or Parquet (.parquet). If the command is
    interrupted, run it again: it continues. Rows that fail are listed in _errors-*.jsonl.
    """

    def load(*, caches_results: bool = True) -> Embedder:
        return load_embedder(
            model,
            source=source,
            revision=revision,
            precision=precision,
            progress=progress,
            caches_results=caches_results,
        )

    request: _Request = {"input_type": input_type, "dimensions": dimensions, "truncate": truncate}
    if out is not None:
        if len(texts) != 1:
            raise click.UsageError(f"With --out, pass one file, not {len(texts)} arguments.")
        from emb_model_provider.bulk.job import BulkOptions
        from emb_model_provider.bulk.rows import Columns

        job = BulkOptions(
            source=Path(texts[0]).expanduser(),
            out=out.expanduser(),
            columns=Columns(text=text_column, id=id_column),
            format=output_format,
            shard=shard,
            part_rows=part_rows,
            **request,
        )
        embed_file(job, lambda: load(caches_results=False), progress, as_json=as_json)
        return
    for name in _FILE_OPTIONS:
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
            option = next(each for each in ctx.command.params if each.name == name).opts[0]
            raise click.UsageError(f"{option} needs --out, the directory for the vectors of a file.")
    check_texts(texts)
    lines = read_texts(texts)
    if (first := next(lines, None)) is None:  # else a model would be downloaded for nothing
        say("There is no text to embed.")
        return

    def work() -> None:
        with load() as embedder:
            index = 0
            remaining = itertools.chain([first], lines)
            while batch := list(itertools.islice(remaining, _BATCH_SIZE)):
                for text, vector in zip(batch, embedder.embed(batch, **request), strict=True):
                    values = vector.tolist()
                    print_line(json.dumps({"index": index, "text": text, "embedding": values} if as_json else values))
                    index += 1

    run_until_interrupted(work, "the vectors above are complete.")


def load_embedder(
    model: str | None,
    *,
    source: Source | None,
    revision: str | None,
    precision: Precision | None,
    progress: Mode,
    caches_results: bool = True,
) -> Embedder:
    """Download, compile and load a model in this process, and show the progress. None: as in the settings."""
    from emb_model_provider.embedder import Embedder
    from emb_model_provider.management.manager import ModelManager

    settings = options.open_settings()
    if not caches_results:
        settings = settings.model_copy(update={"memory": settings.memory.model_copy(update={"result_cache_mb": 0})})
    name, revision = options.split_revision(settings, model or settings.models.specs()[0].alias, revision)
    embedder = Embedder(name, source=source, revision=revision, precision=precision, settings=settings)
    with show_progress(progress) as report:
        report.model(embedder.spec.alias)
        ModelManager(settings).compile(embedder.spec, on_progress=report)
        report(Progress("load", embedder.spec.name))
        return embedder.load()


def check_texts(texts: tuple[str, ...]) -> None:
    """Report a file that does not exist before a model is loaded for it."""
    for text in texts:
        if text.startswith("@") and not _is_readable(_path_of(text)):
            raise click.UsageError(
                f"{text}: no such file. To pass a text that begins with @, write it to stdin and pass - instead."
            )
    if texts.count("-") > 1:
        raise click.UsageError("Stdin can be read only once: pass a single -.")


def _is_readable(path: str) -> bool:
    """Return whether a path is a file, or a pipe such as `@<(command)`."""
    return os.path.exists(path) and not os.path.isdir(path)  # noqa: PTH110, PTH112 - they never raise


def _path_of(text: str) -> str:
    return os.path.expanduser(text[1:])  # noqa: PTH111 - pathlib raises for a ~ that it cannot expand


def read_texts(texts: tuple[str, ...]) -> Iterator[str]:
    for text in texts:
        if text == "-":
            yield from (line.decode("utf-8", "replace").rstrip("\r\n") for line in sys.stdin.buffer)
        elif text.startswith("@"):
            with Path(_path_of(text)).open(encoding="utf-8-sig", errors="replace") as file:
                yield from (line.rstrip("\r\n") for line in file)
        else:
            yield text
