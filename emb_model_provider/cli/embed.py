"""`emb-provider embed`: vectors on stdout, without a server."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from emb_model_provider.cli import options
from emb_model_provider.cli.interrupt import run_until_interrupted
from emb_model_provider.cli.output import out, say, show_progress
from emb_model_provider.progress import Mode, Progress

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emb_model_provider.embedder import Embedder
    from emb_model_provider.model_spec import Precision, Source

_BATCH_SIZE = 256
"""Texts that are read before their vectors are printed. It bounds the memory that a long file takes."""


@click.command()
@click.argument("texts", nargs=-1, required=True, metavar="TEXT|-|@FILE...")
@click.option("--model", "-m", type=options.ModelId(), help="Model to use. Default: the first model of the settings.")
@options.source
@options.revision
@options.precision
@options.progress
@click.option("--json", "as_json", is_flag=True, help="Print one object per line: index, text, embedding.")
def embed(
    texts: tuple[str, ...],
    model: str | None,
    source: Source | None,
    revision: str | None,
    precision: Precision | None,
    progress: Mode,
    *,
    as_json: bool,
) -> None:
    """Print the vector of each text.

    Each vector is a JSON array on one line. `-` reads texts from stdin and `@FILE` from a file, one per line. The model
    is downloaded and compiled if necessary, and runs in this process: no server is used.
    """
    check_texts(texts)
    lines = read_texts(texts)
    if (first := next(lines, None)) is None:  # else a model would be downloaded for nothing
        say("There is no text to embed.")
        return

    def work() -> None:
        with load_embedder(model, source=source, revision=revision, precision=precision, progress=progress) as embedder:
            index = 0
            remaining = itertools.chain([first], lines)
            while batch := list(itertools.islice(remaining, _BATCH_SIZE)):
                for text, vector in zip(batch, embedder.embed(batch), strict=True):
                    values = vector.tolist()
                    out(json.dumps({"index": index, "text": text, "embedding": values} if as_json else values))
                    index += 1

    run_until_interrupted(work, "the vectors above are complete.")


def load_embedder(
    model: str | None, *, source: Source | None, revision: str | None, precision: Precision | None, progress: Mode
) -> Embedder:
    """Download, compile and load a model in this process, and show the progress. None: as in the settings."""
    from emb_model_provider.embedder import Embedder
    from emb_model_provider.management.manager import ModelManager

    settings = options.open_settings()
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
