"""What commands print: data on stdout, all else on stderr."""

from __future__ import annotations

import codecs
import json
import os
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypedDict

import click

from emb_model_provider.errors import (
    AccessDeniedError,
    AmbiguousNameError,
    ModelInUseError,
    NotAllowedError,
    NotCachedError,
    ProviderError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SettingsError,
)
from emb_model_provider.formatting import format_age, format_cosine, format_size

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from emb_model_provider.management.types import CachedSnapshot, DerivedArtifact, Removal, Verification


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


FAILED = 1
"""The work failed, or something differs."""
NOT_SO = 2
"""It cannot be asked like this: usage, not found, not allowed."""
OUT_OF_REACH = 3
"""No server answers."""
INTERRUPTED = 130
"""Ctrl-C."""

_ASKED_WRONGLY = (
    SettingsError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    AccessDeniedError,
    NotCachedError,
    AmbiguousNameError,
    NotAllowedError,
    ModelInUseError,
)


class OutOfReachError(ProviderError):
    """No server of ours answers at the address."""


class RefusedError(ProviderError):
    """The server does not do what was asked; `status` is the exit status that this means."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


def status_of(error: ProviderError) -> int:
    """Return the exit status that an error means."""
    if isinstance(error, RefusedError):
        return error.status
    if isinstance(error, OutOfReachError):
        return OUT_OF_REACH
    return NOT_SO if isinstance(error, _ASKED_WRONGLY) else FAILED


class ArtifactInfo(TypedDict):
    """What was compiled from a model."""

    key: str
    precision: str
    computed: str
    size: int
    last_used: datetime
    fidelity: dict[str, Any] | None
    """`min_cosine`, `mean_cosine`, `texts`, `top10_overlap`, `spearman`."""
    in_use: bool


class ModelInfo(TypedDict):
    """A model on disk."""

    id: str
    model_name: str
    source: str
    revision: str | None
    asked_revision: str | None
    path: str | None
    state: str
    size: int
    """Of its files, and of what was compiled from them."""
    files_size: int
    artifacts: list[ArtifactInfo]
    fetched: datetime | None
    last_used: datetime | None
    in_use: bool


def model_info(entry: CachedSnapshot) -> ModelInfo:
    """Return what is known of a model, by the names that `GET /api/models/cache/list` has for it."""
    return {
        "id": entry.id,
        "model_name": entry.name,
        "source": entry.hub,
        "revision": entry.revision,
        "asked_revision": entry.asked_revision,
        "path": str(entry.path) if entry.path is not None else None,
        "state": entry.state,
        "size": size_on_disk(entry),
        "files_size": entry.size,
        "artifacts": [_artifact_info(artifact) for artifact in entry.artifacts],
        "fetched": entry.fetched,
        "last_used": entry.last_used,
        "in_use": entry.in_use,
    }


def _artifact_info(artifact: DerivedArtifact) -> ArtifactInfo:
    return {
        "key": artifact.key,
        "precision": artifact.precision,
        "computed": artifact.computed,
        "size": artifact.size,
        "last_used": artifact.last_used,
        "fidelity": asdict(artifact.fidelity) if artifact.fidelity is not None else None,
        "in_use": artifact.in_use,
    }


def size_on_disk(entry: CachedSnapshot) -> int:
    """Return the bytes of a model's files and of what was compiled from them."""
    return entry.size + sum(artifact.size for artifact in entry.artifacts)


def removal_info(removals: Iterable[Removal], *, dry_run: bool) -> dict[str, Any]:
    """Return `dry_run`, `models` (as they were), `artifacts` (keys), `freed` (bytes), `kept` (models with a `reason`)."""
    done = list(removals)
    return {
        "dry_run": dry_run,
        "models": [model_info(entry) for removal in done for entry in removal.snapshots],
        "artifacts": [key for removal in done for key in removal.artifacts],
        "freed": sum(removal.freed for removal in done),
        "kept": [
            {**model_info(entry), "reason": reason} for removal in done for entry, reason in removal.kept
        ],
        "unloaded": [],
    }


def verification_info(results: Iterable[Verification]) -> dict[str, Any]:
    """Return `ok`, and `models`, each with `ok`, `findings` (files and their problems), `damaged_artifacts` (keys)."""
    done = list(results)
    return {
        "ok": all(result.ok for result in done),
        "models": [
            {
                **model_info(result.snapshot),
                "ok": result.ok,
                "findings": [asdict(finding) for finding in result.findings],
                "damaged_artifacts": list(result.damaged_artifacts),
            }
            for result in done
        ],
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


def model_row(entry: CachedSnapshot) -> Sequence[str]:
    """Return a model's cells for `list`."""

    artifacts = entry.artifacts
    labels = [precision_label(artifact.precision, artifact.computed) for artifact in artifacts]
    cosines = [format_cosine(a.fidelity.min_cosine) if a.fidelity is not None else "-" for a in artifacts]
    return (
        entry.name,
        entry.hub,
        short_revision(entry.revision or entry.asked_revision),
        format_size(size_on_disk(entry)),
        ", ".join(labels) or "-",
        entry.state + (", in use" if entry.in_use else ""),
        ", ".join(cosines) or "-",
        format_age(entry.last_used),
    )


MODEL_HEAD = ("ID", "SOURCE", "REVISION", "SIZE", "PRECISION", "STATE", "FIDELITY", "LAST USED")
