"""What commands print: data on stdout, all else on stderr."""

from __future__ import annotations

import codecs
import json
import os
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

_ASCII = {"÷": "/", "…": "...", "–": "-", "—": "-", "×": "x"}
_ERRORS = "emb_provider_ascii"
_UNITS = ("B", "kB", "MB", "GB", "TB")
_SPANS = (("day", 86_400), ("hour", 3_600), ("minute", 60))


def prepare_streams() -> None:
    """Let text that stdout's or stderr's encoding lacks be shown in plain ASCII: no name may break a command.

    A stream that this process was started without (`>&-`) is one that leads nowhere, and so not a file's first write.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 - for as long as we live
    codecs.register_error(_ERRORS, _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=_ERRORS)


def _in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    part = error.object[error.start : error.end]
    shown = "".join(_ASCII.get(char) or char.encode("ascii", "backslashreplace").decode() for char in part)
    return shown, error.end


def out(text: str) -> None:
    """Print a line of what was asked for, on stdout."""
    # Left to find stdout itself, click writes UTF-8 where the encoding is ASCII.
    click.echo(text, file=sys.stdout)


def say(message: str) -> None:
    """Print a line for people, on stderr."""
    click.echo(message, file=sys.stderr)


def warn(message: str) -> None:
    say(f"{styled('warning:', fg='yellow')} {message}")


def styled(text: str, *, fg: str) -> str:
    """Color a text where NO_COLOR allows it; click takes colors away where no terminal shows them."""
    return text if os.environ.get("NO_COLOR") else click.style(text, fg=fg)


def print_json(value: Any) -> None:
    """Print a value as JSON on stdout: sizes are integers in bytes, times ISO 8601 in UTC."""
    out(json.dumps(value, indent=1, default=_plain))


def print_json_line(value: Any) -> None:
    out(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return str(value)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return columns that are as wide as they must be."""
    lines = [head, *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def pairs(values: Sequence[tuple[str, str]], *, indent: int = 2) -> str:
    """Return names and values in two columns."""
    width = max((len(name) for name, _ in values), default=0)
    return "\n".join(f"{'':{indent}}{name:{width}}  {value}" for name, value in values)


def size(count: float | None) -> str:
    """Return bytes for people, in powers of 1000: `1.2 GB`."""
    if count is None:
        return "-"
    unit = 0
    while abs(count) >= 999.5 and unit < len(_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    return f"{count:.0f} {_UNITS[unit]}" if unit == 0 or count >= 99.95 else f"{count:.1f} {_UNITS[unit]}"


def ago(moment: datetime | None, now: datetime | None = None) -> str:
    """Return how long ago a moment was: `3 hours ago`."""
    if moment is None:
        return "-"
    seconds = ((now or datetime.now(UTC)) - moment).total_seconds()
    for name, length in _SPANS:
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "just now"


def duration(seconds: float) -> str:
    """Return a time for people: `1:05`, `2:03:04`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def confirm(question: str, *, yes: bool) -> None:
    """Ask before something is deleted; `yes` is the answer already.

    Raises: click.UsageError where nobody can be asked; click.exceptions.Exit where the answer is no.
    """
    if yes:
        return
    if not sys.stdin.isatty():
        raise click.UsageError(
            f"{question} There is no terminal to ask on: say --yes, or look with --dry-run."
        )
    if not click.confirm(question, err=True):
        say("Nothing was removed.")
        raise click.exceptions.Exit(1)
