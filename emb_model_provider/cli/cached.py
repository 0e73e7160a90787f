"""`emb-provider list`, `show` and `verify`: what is on disk, and whether it is as it was fetched."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from emb_model_provider.cli.interrupt import run_until_interrupted
from emb_model_provider.cli.options import (
    ModelId,
    json_option,
    open_manager,
    progress_option,
    quiet_option,
    revision_option,
    source_option,
    split_revision,
)
from emb_model_provider.cli.output import out, pairs, print_json, say, table
from emb_model_provider.error_table import FAILED
from emb_model_provider.formatting import format_age, format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emb_model_provider.cli.progress import CommandProgress, Mode
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.management.types import CachedModelRecord, Verification
    from emb_model_provider.model_spec import Source
    from emb_model_provider.settings import Settings


@click.command("list")
@click.option("--all", "everything", is_flag=True, help="Also what other programs left in the hubs' caches.")
@quiet_option("ids")
@json_option
def list_models(*, everything: bool, quiet: bool, as_json: bool) -> None:
    """List models on disk.

    SIZE is that of a model's files and of what was compiled from them; FIDELITY is the lowest cosine to fp32, for each
    PRECISION that is compiled. STATE is complete, incomplete (a fetch that was broken off: pull it again), damaged
    (verify --repair) or unverified (another program fetched it: pull checks it).

    JSON: {"models": [{id, model_name, source, revision, asked_revision, path, state, size, files_size, artifacts:
    [{key, precision, computed, size, last_used, fidelity, in_use}], fetched, last_used, in_use}], "total_size"}.
    """
    from emb_model_provider.cli.output import MODEL_HEAD, model_row

    _, manager = open_manager()
    entries = manager.list(everything=everything)
    if as_json:
        print_json({"models": [entry.model_dump() for entry in entries], "total_size": _total(entries)})
        return
    if quiet:
        for name in dict.fromkeys(entry.model_name for entry in entries):
            out(name)
        return
    out(table(MODEL_HEAD, [model_row(entry) for entry in entries]))
    if not entries:
        say("No model is here yet. To fetch one: emb-provider pull ID")


def _total(entries: Sequence[CachedModelRecord]) -> int:
    """Return the bytes of all models together; an artifact that serves two of them counts once."""
    artifacts = {artifact.key: artifact.size for entry in entries for artifact in entry.artifacts}
    return sum(entry.files_size for entry in entries) + sum(artifacts.values())


@click.command()
@click.argument("model", type=ModelId(), metavar="ID[@REV]")
@source_option
@revision_option
@json_option
def show(model: str, source: Source | None, revision: str | None, *, as_json: bool) -> None:
    """Show a model on disk in detail.

    Dimensions, tokens, pooling, license, files with their hashes, compiled forms and how true to fp32 they are.

    JSON: {"models": [...]}: what `list` has of each, with `details`.
    """
    settings, manager = open_manager()
    found = _find(settings, manager, model, source, revision)
    told = []
    for model_record in found:
        details = manager.inspect(model_record).model_dump()
        artifacts = [{**each.model_dump(), "snapshot": each.snapshot} for each in model_record.artifacts]
        told.append({**model_record.model_dump(), "details": {**details, "artifacts": artifacts}})
    if as_json:
        print_json({"models": told})
        return
    for place, one in enumerate(told):
        out(("\n" if place else "") + str(one["model_name"]))
        out(_shown(one))


def _shown(one: dict[str, Any]) -> str:
    """Return a model's figures, then its files and compiled forms, for people."""
    from emb_model_provider.cli.output import precision_label
    from emb_model_provider.formatting import format_cosine

    details = dict(one["details"])
    files = details.get("files") or []
    lines = [
        (name.replace("_", " "), _value(one[name]))
        for name in ("source", "revision", "state", "path", "fetched", "last_used")
    ]
    lines += [("size", format_size(one["size"])), ("in use", "yes" if one["in_use"] else "no")]
    known = {*one, "files", "artifacts", "name", "hub", "digest", "details"}
    lines += [(name.replace("_", " "), _value(value)) for name, value in details.items() if name not in known]
    for artifact in one["artifacts"]:
        cosine = format_cosine(artifact["fidelity"]["min_cosine"]) if artifact["fidelity"] else "not measured"
        label = precision_label(artifact["precision"], artifact["computed"])
        lines.append(
            (
                "compiled",
                f"{label}, {format_size(artifact['size'])}, fidelity {cosine}, {artifact['key'][:12]}",
            )
        )
    shown = pairs([line for line in lines if line[1]])
    if files:
        shown += "\n  files\n" + table(
            ("    PATH", "SIZE", "SHA256"),
            [
                (f"    {file['path']}", format_size(file["size"]), str(file.get("sha256") or "-"))
                for file in files
            ],
        )
    return shown


def _value(value: object) -> str:
    """Return a value for people; an empty string where there is none."""
    match value:
        case None:
            return ""
        case bool():
            return "yes" if value else "no"
        case datetime():
            return f"{value.astimezone(UTC):%Y-%m-%d %H:%M} UTC, {format_age(value)}"
        case dict():
            return ", ".join(f"{name}: {inner!r}" for name, inner in value.items())
        case list() | tuple():
            return ", ".join(map(str, value))
        case _:
            return str(value)


@click.command()
@click.argument("models", nargs=-1, type=ModelId(), metavar="[ID]...")
@click.option(
    "--repair", is_flag=True, help="Fetch again what differs, and remove compiled forms that are damaged."
)
@source_option
@revision_option
@progress_option
@json_option
def verify(
    models: tuple[str, ...],
    source: Source | None,
    revision: str | None,
    progress: Mode,
    *,
    repair: bool,
    as_json: bool,
) -> None:
    """Compare models with what was fetched.

    Every byte is read again; without ID, of all models. The exit status is 1 if anything differs, and still does after
    --repair.

    JSON: {"ok", "models": [...]}: what `list` has of each, and its `ok`, `findings` [{path, problem}] and
    `damaged_artifacts`.
    """
    from emb_model_provider.cli.progress import CommandProgress

    settings, manager = open_manager()
    if models:
        chosen = [entry for typed in models for entry in _find(settings, manager, typed, source, revision)]
    else:
        chosen = [entry for entry in manager.list() if source in (None, "auto", entry.source)]

    def work() -> list[Verification]:
        with CommandProgress(progress) as report:
            return [_verify_one(manager, entry, report, repair=repair) for entry in chosen]

    results = run_until_interrupted(work, "nothing was changed, or what was repaired is whole.")
    if as_json:
        print_json(
            {
                "ok": all(result.ok for result in results),
                "models": [result.model_dump() for result in results],
            }
        )
    else:
        for result in results:
            _print_result(result)
        if not results:
            say("No model is here to be verified.")
    if not all(result.ok for result in results):
        if not repair:
            say("To fetch again what differs: emb-provider verify --repair")
        raise SystemExit(FAILED)


def _verify_one(
    manager: ModelManager, model: CachedModelRecord, report: CommandProgress, *, repair: bool
) -> Verification:
    from emb_model_provider.errors import ProviderError

    report.model(model.model_name)
    result = manager.verify(model, on_progress=report)
    if result.ok or not repair:
        return result
    try:
        result, notes = manager.repair(result, on_progress=report)
    except ProviderError as error:
        notes = [f"Error: {model.model_name} could not be repaired: {error.message}"]
    for note in notes:
        report.note(note)
    return result


def _print_result(result: Verification) -> None:
    name = f"{result.model_name} ({result.source})"
    if result.ok:
        out(f"{name}: ok, {format_size(result.files_size)}")
        return
    out(f"{name}: {result.state if result.state != 'complete' else 'differs'}")
    for finding in result.findings:
        out(f"  {finding.path}: {_PROBLEMS[finding.problem]}")
    for key in result.damaged_artifacts:
        out(f"  compiled form {key[:12]}: damaged")


_PROBLEMS = {
    "missing": "is missing",
    "size": "has another size",
    "bytes": "has other bytes",
    "unreadable": "cannot be read",
}


def _find(
    settings: Settings, manager: ModelManager, typed: str, source: Source | None, revision: str | None
) -> list[CachedModelRecord]:
    """Raises: NotCachedError."""
    name, own = split_revision(settings, typed)
    return manager.find(name, source=source, revision=own or revision)
