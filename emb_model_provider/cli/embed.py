"""`emb-provider embed`: vectors on stdout, without a server."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from emb_model_provider.cli.interrupt import run_until_interrupted
from emb_model_provider.cli.options import (
    ModelId,
    precision_option,
    progress_option,
    revision_option,
    source_option,
)
from emb_model_provider.cli.output import print_json_line

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emb_model_provider.cli.progress import Mode
    from emb_model_provider.model_spec import Precision, Source

_AT_A_TIME = 256
"""Lines that are read before their vectors are printed: a file of any length needs no more memory than these."""


@click.command()
@click.argument("texts", nargs=-1, required=True, metavar="TEXT|-|@FILE...")
@click.option("--model", "-m", type=ModelId(), help="Default: the first model of your settings.")
@source_option
@revision_option
@precision_option
@progress_option
@click.option("--json", "as_json", is_flag=True, help="An object a line: index, text, embedding.")
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

    It is a JSON array on a line of its own. `-` reads standard input, `@FILE` a file, one text a line each. The model
    is fetched and compiled where that is needed, and runs in this process: no server is asked.
    """
    _require_files(texts)
    from emb_model_provider.cli.options import open_settings, split_revision
    from emb_model_provider.cli.progress import CommandProgress
    from emb_model_provider.embedder import Embedder
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.model_resolver import resolve_model
    from emb_model_provider.progress import Progress

    settings = open_settings()
    name, own = split_revision(settings, model or settings.models.specs()[0].alias)
    spec = resolve_model(settings, name, source=source, revision=own or revision, precision=precision)

    def work() -> None:
        lines = _lines(texts)
        with contextlib.ExitStack() as stack:
            with CommandProgress(progress) as report:
                report.model(spec.alias)
                ModelManager(settings).ensure(spec, on_progress=report)
                report(Progress("load", spec.name))
                embedder = stack.enter_context(
                    Embedder(
                        name, source=source, revision=own or revision, precision=precision, settings=settings
                    )
                )
            index = 0
            while batch := list(itertools.islice(lines, _AT_A_TIME)):
                for text, vector in zip(batch, embedder.embed(batch), strict=True):
                    values = [float(value) for value in vector]
                    print_json_line(
                        {"index": index, "text": text, "embedding": values} if as_json else values
                    )
                    index += 1

    run_until_interrupted(work, "the vectors above are whole.")


def _require_files(texts: tuple[str, ...]) -> None:
    """Say that a file is not there before a model is loaded for it."""
    for text in texts:
        if text.startswith("@") and not _is_readable(_path(text)):
            raise click.UsageError(
                f"{text}: there is no such file. (A text that begins with @ is read from stdin: -)"
            )
    if texts.count("-") > 1:
        raise click.UsageError("Standard input can be read once: say - once.")


def _is_readable(path: str) -> bool:
    """Whether it is a file, or a pipe as of `@<(command)`."""
    return os.path.exists(path) and not os.path.isdir(path)  # noqa: PTH110, PTH112 - they never raise


def _path(text: str) -> str:
    """Return what `@FILE` names; a ~ that nobody's home follows is part of the name."""
    return os.path.expanduser(text[1:])  # noqa: PTH111 - pathlib's raises where nobody has the name


def _lines(texts: tuple[str, ...]) -> Iterator[str]:
    """Give the texts one by one, files and standard input line by line."""
    for text in texts:
        if text == "-":
            yield from (line.decode("utf-8", "replace").rstrip("\r\n") for line in sys.stdin.buffer)
        elif text.startswith("@"):
            with Path(_path(text)).open(encoding="utf-8-sig", errors="replace") as file:
                yield from (line.rstrip("\r\n") for line in file)
        else:
            yield text
