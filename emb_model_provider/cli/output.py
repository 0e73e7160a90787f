"""Output of commands: data on stdout, everything else on stderr; and the exit codes of errors."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from emb_model_provider.error_table import UNREACHABLE, error_info
from emb_model_provider.errors import ProviderError

if TYPE_CHECKING:
    from collections.abc import Sequence


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
    """Print a warning on stderr."""
    say(f"{styled('warning:', fg='yellow')} {message}")


def styled(text: str, *, fg: str) -> str:
    """Return a colored text, unless NO_COLOR is set. `click.echo` removes colors if the stream is not a terminal."""
    return text if os.environ.get("NO_COLOR") else click.style(text, fg=fg)


def print_json(value: Any) -> None:
    """Print a value as indented JSON on stdout."""
    out(json.dumps(value, indent=1))


def print_json_line(value: Any) -> None:
    """Print a value as one line of JSON on stdout."""
    out(json.dumps(value))


def confirm(question: str, *, yes: bool) -> None:
    """Ask for confirmation before something is deleted.

    Args:
        question: The question.
        yes: The answer was given on the command line.

    Raises:
        click.UsageError: Stdin is not a terminal.
        click.exceptions.Exit: The answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(
            f"{question} Cannot ask, because stdin is not a terminal: add --yes, or check with --dry-run first."
        )
    if not click.confirm(question, err=True):
        say("Nothing was removed.")
        raise click.exceptions.Exit(1)


# --- formatting ---------------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as aligned columns."""
    lines = [head, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def pairs(values: Sequence[tuple[str, str]], *, indent: int = 2) -> str:
    """Return names and values as two columns."""
    width = max((len(name) for name, _ in values), default=0)
    return "\n".join(f"{'':{indent}}{name:{width}}  {value}" for name, value in values)


def precision_label(precision: str, computed: str) -> str:
    """Return the name of a compiled form: the precision of its weights, or of the computation if they are fp32."""
    return computed if precision == "fp32" else precision


# --- errors -------------------------------------------------------------------------------------------


class ServerUnreachableError(ProviderError):
    """No server of this service answers at the address."""

    exit_code = UNREACHABLE


class ServerRefusedError(ProviderError):
    """The server refused a request, or the request could not be sent.

    Attributes:
        exit_code: Exit code of the command.
    """

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def exit_code_of(error: ProviderError) -> int:
    """Return the exit code of a command that failed with an error."""
    if isinstance(error, ServerUnreachableError | ServerRefusedError):
        return error.exit_code
    return error_info(error).exit_code
