"""Output of commands: data on stdout, progress and everything else on stderr; and the exit codes of errors."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from emb_model_provider.error_table import UNREACHABLE, error_info
from emb_model_provider.errors import ProviderError
from emb_model_provider.progress import Mode, ProgressReporter

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


# --- printing -----------------------------------------------------------------------------------------


def prepare_streams() -> None:
    """Make stdout and stderr accept any text, and open streams that the process was started without."""
    # Without a stream (`>&-`) its file descriptor would be given to the next file that is opened.
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 - never closed
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def out(text: str) -> None:
    """Print a line of data on stdout."""
    # If click chooses the stream, it writes UTF-8 even if the encoding of stdout is ASCII.
    click.echo(text, file=sys.stdout)


def say(message: str) -> None:
    """Print a line for people on stderr."""
    click.echo(message, file=sys.stderr)


def warn(message: str) -> None:
    say(f"{styled('warning:', fg='yellow')} {message}")


def styled(text: str, *, fg: str) -> str:
    """Return a colored text, unless NO_COLOR is set or the terminal has no colors.

    `click.echo` removes colors if the stream is not a terminal.
    """
    has_colors = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return click.style(text, fg=fg) if has_colors else text


def print_json(value: Any) -> None:
    out(json.dumps(value, indent=1))


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is deleted, unless the command line contains the answer. Without a yes the command ends."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(
            f"{question} Cannot ask, because stdin is not a terminal: add --yes, or check with --dry-run first."
        )
    if not click.confirm(question, err=True):
        say("Nothing was removed.")
        raise click.exceptions.Exit(1)


# --- progress -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def show_progress(mode: Mode) -> Iterator[ProgressReporter]:
    """Show progress on stderr, with the warnings of the package and its libraries between the lines."""
    with ProgressReporter(mode) as report:
        handler = _NoteHandler(report)
        logging.getLogger().addHandler(handler)
        try:
            yield report
        finally:
            logging.getLogger().removeHandler(handler)


class _NoteHandler(logging.Handler):
    """Shows each warning once, even if a model is prepared twice."""

    def __init__(self, reporter: ProgressReporter) -> None:
        super().__init__(logging.WARNING)
        self._reporter = reporter
        self._shown: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._shown:
            self._shown.add(message)
            self._reporter.note(f"warning: {message}")


# --- formatting ---------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as aligned columns."""
    lines = [head, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def pairs(values: Sequence[tuple[str, str]]) -> str:
    """Return names and values as two columns."""
    width = max((len(name) for name, _ in values), default=0)
    return "\n".join(f"  {name:{width}}  {value}" for name, value in values)


# --- errors -------------------------------------------------------------------------------------------


class ServerError(ProviderError):
    """The server cannot be reached, or refused a request, or the request could not be sent."""

    def __init__(self, message: str, *, exit_code: int, code: str | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code
        self.code = code or ("server_unreachable" if exit_code == UNREACHABLE else "invalid_usage")
        """The code of the server's error, or of this one."""


def error_as_json(error: ProviderError) -> dict[str, str]:
    """Return an error as --json shows it, with the code that the API has for it."""
    code = error.code if isinstance(error, ServerError) else error_info(error).code
    return {"code": code, "message": error.message}


def exit_code_of(error: ProviderError) -> int:
    """Return the exit code of a command that failed with an error."""
    return error.exit_code if isinstance(error, ServerError) else error_info(error).exit_code
