"""What commands print: data on stdout, all else on stderr."""

from __future__ import annotations

import codecs
import json
import os
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from emb_model_provider.error_table import UNREACHABLE, error_info
from emb_model_provider.errors import ProviderError
from emb_model_provider.formatting import format_age, format_cosine, format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from emb_model_provider.management.types import CachedModelRecord, Removal


_ASCII = {"÷": "/", "…": "...", "–": "-", "—": "-", "×": "x"}
_ERRORS = "emb_provider_ascii"


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


class ServerUnreachableError(ProviderError):
    """No server of ours answers at the address."""


class ServerRefusedError(ProviderError):
    """The server does not do what was asked; `status` is the exit status that this means."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


def exit_code_of(error: ProviderError) -> int:
    """Return the exit status that an error means."""
    if isinstance(error, ServerRefusedError):
        return error.status
    if isinstance(error, ServerUnreachableError):
        return UNREACHABLE
    return error_info(error).exit_code


def removal_info(removals: Iterable[Removal], *, dry_run: bool) -> dict[str, Any]:
    """Return `dry_run`, `models` (as they were), `artifacts` (keys), `freed` (bytes), `kept` (models with a `reason`)."""
    done = list(removals)
    return {
        "dry_run": dry_run,
        "models": [model.model_dump() for removal in done for model in removal.models],
        "artifacts": [key for removal in done for key in removal.artifacts],
        "freed": sum(removal.freed for removal in done),
        "kept": [model.model_dump() for removal in done for model in removal.kept],
        "unloaded": [],
    }


# --- for people -------------------------------------------------------------------------------------------


def precision_label(precision: str, computed: str) -> str:
    """Return the name that a compiled model goes by: weights that are kept whole are known by what they compute in."""
    return computed if precision == "fp32" else precision


def short_revision(revision: str | None) -> str:
    """Return a branch or tag as it is, and of a commit what tells it from others."""
    if revision is None:
        return "-"
    is_commit = len(revision) == 40 and all(char in "0123456789abcdef" for char in revision)
    return revision[:8] if is_commit else revision


def model_row(model: CachedModelRecord) -> Sequence[str]:
    """Return a model's cells for `list`."""
    artifacts = model.artifacts
    labels = [precision_label(artifact.precision, artifact.computed) for artifact in artifacts]
    cosines = [format_cosine(a.fidelity.min_cosine) if a.fidelity is not None else "-" for a in artifacts]
    return (
        model.model_name,
        model.source,
        short_revision(model.revision or model.asked_revision),
        format_size(model.size),
        ", ".join(labels) or "-",
        model.state + (", in use" if model.in_use else ""),
        ", ".join(cosines) or "-",
        format_age(model.last_used),
    )


MODEL_HEAD = ("ID", "SOURCE", "REVISION", "SIZE", "PRECISION", "STATE", "FIDELITY", "LAST USED")
