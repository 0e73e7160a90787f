"""`emb-provider list`, `show` and `verify`: the models on disk."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emb_model_provider.cli import options
from emb_model_provider.cli.interrupt import run_until_interrupted
from emb_model_provider.cli.output import out, pairs, print_json, say, show_progress, table
from emb_model_provider.error_table import FAILED
from emb_model_provider.errors import ProviderError
from emb_model_provider.formatting import format_age, format_cosine, format_size, precision_label

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.management.types import CachedModelRecord, Details, Verification
    from emb_model_provider.model_spec import Source
    from emb_model_provider.progress import Mode, ProgressReporter
    from emb_model_provider.settings import Settings

_HEAD = ("ID", "SOURCE", "REVISION", "SIZE", "PRECISION", "STATE", "FIDELITY", "LAST USED")
_PROBLEMS = {
    "missing": "is missing",
    "size": "has the wrong size",
    "bytes": "has the wrong content",
    "unreadable": "cannot be read",
    "extra": "is not in the manifest",
}


@click.command("list")
@click.option("--all", "everything", is_flag=True, help="Include models that other programs left in the hubs' caches.")
@options.quiet("ids")
@options.json
def list_models(*, everything: bool, quiet: bool, as_json: bool) -> None:
    """List the models on disk.

    SIZE includes the files of a model and its compiled forms. In the total, which is printed on stderr, files that
    several models share count once. PRECISION lists the compiled forms, and FIDELITY the
    lowest cosine of each to fp32. STATE is complete, incomplete (a download was interrupted: run pull again), damaged
    (run verify --repair) or unverified (another program downloaded it: pull checks it).

    JSON: {"models": [{id, model_name, source, revision, asked_revision, path, state, size, files_size, artifacts:
    [{key, precision, computed, size, last_used, fidelity, in_use}], fetched, last_used, in_use}], "total_size"}.
    """
    _, manager = options.open_manager()
    models = manager.list(everything=everything)
    if as_json:
        total_size = manager.total_size(models)
        print_json({"models": [model.model_dump(mode="json") for model in models], "total_size": total_size})
        return
    if quiet:
        for name in dict.fromkeys(model.model_name for model in models):
            out(name)
        return
    out(table(_HEAD, [_row(model) for model in models]))
    if not models:
        say("There are no models on disk. To download one: emb-provider pull ID")
    elif len(models) > 1:
        say(f"{len(models)} models, {format_size(manager.total_size(models))} in total")


@click.command()
@click.argument("model", type=options.ModelId(), metavar="ID[@REV]")
@options.source
@options.revision
@options.json
def show(model: str, source: Source | None, revision: str | None, *, as_json: bool) -> None:
    """Show details of a model on disk.

    Dimensions, maximum length, pooling, license, files with their hashes, and compiled forms with their fidelity.

    JSON: {"models": [...]}: each as in `list`, with `details`.
    """
    settings, manager = options.open_manager()
    records = _find(settings, manager, model, source, revision)
    models = [(record, manager.inspect(record)) for record in records]
    if as_json:
        print_json({"models": [_to_json(record, details) for record, details in models]})
    else:
        out("\n\n".join(f"{record.model_name}\n{_describe(record, details)}" for record, details in models))


@click.command()
@click.argument("models", nargs=-1, type=options.ModelId(), metavar="[ID|DIR]...")
@click.option("--repair", is_flag=True, help="Download wrong files again, and remove damaged compiled forms.")
@options.source
@options.revision
@options.progress
@options.json
def verify(
    models: tuple[str, ...], source: Source | None, revision: str | None, progress: Mode, *, repair: bool, as_json: bool
) -> None:
    """Compare models and mirrors with what was downloaded.

    Hashes every file again; without ID, those of all models. The exit code is 1 if a model differs; with --repair, if it
    still differs afterwards. DIR is a directory that `mirror` wrote, or a copy of one: files that its manifest does not
    list are differences, too.

    JSON: {"ok", "models": [...]}: each as in `list`, with `ok`, `findings` [{path, problem}] and `damaged_artifacts`.
    """
    settings, manager = options.open_manager()
    if models:
        records = [record for name in models for record in _find(settings, manager, name, source, revision)]
    else:
        records = [
            record
            for record in manager.list()
            if source in (None, "auto", record.source) and revision in (None, record.revision, record.asked_revision)
        ]

    def work() -> list[Verification]:
        with show_progress(progress) as report:
            return [_verify(manager, record, report, repair=repair) for record in records]

    results = run_until_interrupted(work, "nothing was changed, except for files that were repaired completely.")
    ok = all(result.ok for result in results)
    if as_json:
        print_json({"ok": ok, "models": [result.model_dump(mode="json") for result in results]})
    else:
        for result in results:
            _print_verification(result)
        if not results:
            say("There are no models on disk to verify.")
    if not ok:
        if not repair:
            say(_advice([result for result in results if not result.ok]))
        raise SystemExit(FAILED)


# --- list ---------------------------------------------------------------------------------------------


def _row(model: CachedModelRecord) -> Sequence[str]:
    labels = [precision_label(artifact.precision, artifact.computed) for artifact in model.artifacts]
    revision = model.revision or model.asked_revision or "-"
    is_commit = re.fullmatch(r"[0-9a-f]{40}", revision) is not None
    cosines = [
        format_cosine(min(each.fidelity.agreement.values())) if each.fidelity else "-" for each in model.artifacts
    ]
    return (
        model.model_name,
        model.source,
        revision[:8] if is_commit else revision,
        format_size(model.size),
        ", ".join(labels) or "-",
        model.state + (", in use" if model.in_use else ""),
        ", ".join(cosines) or "-",
        format_age(model.last_used),
    )


# --- show ---------------------------------------------------------------------------------------------


def _find(
    settings: Settings, manager: ModelManager, argument: str, source: Source | None, revision: str | None
) -> list[CachedModelRecord]:
    name, revision = options.split_revision(settings, argument, revision)
    return manager.find(name, source=source, revision=revision, directories=True)


def _to_json(model: CachedModelRecord, details: Details) -> dict[str, Any]:
    artifacts = [{**artifact.model_dump(mode="json"), "snapshot": artifact.snapshot} for artifact in model.artifacts]
    return {**model.model_dump(mode="json"), "details": {**details.model_dump(mode="json"), "artifacts": artifacts}}


def _describe(model: CachedModelRecord, details: Details) -> str:
    values: dict[str, object] = {
        "source": model.source,
        "revision": model.revision,
        "state": model.state,
        "path": model.path,
        "downloaded": model.fetched,
        "last used": model.last_used,
        "size": format_size(model.size),
        "in use": model.in_use,
    }
    values |= {name.replace("_", " "): value for name, value in details.model_dump(exclude={"files"}).items()}
    lines = [(name, _format_value(value)) for name, value in values.items()]
    for artifact in model.artifacts:
        fidelity = format_cosine(min(artifact.fidelity.agreement.values())) if artifact.fidelity else "not measured"
        label = precision_label(artifact.precision, artifact.computed)
        lines.append(("compiled", f"{label}, {format_size(artifact.size)}, fidelity {fidelity}, {artifact.key[:12]}"))
    text = pairs([line for line in lines if line[1]])
    if details.files:
        rows = [(f"    {file.path}", format_size(file.size), file.sha256 or "-") for file in details.files]
        text += "\n  files\n" + table(("    PATH", "SIZE", "SHA256"), rows)
    return text


def _format_value(value: object) -> str:
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


# --- verify -------------------------------------------------------------------------------------------


def _verify(manager: ModelManager, model: CachedModelRecord, report: ProgressReporter, *, repair: bool) -> Verification:
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


def _advice(wrong: Sequence[Verification]) -> str:
    from emb_model_provider.snapshots.mirror import is_mirror

    if all(result.source == "local" and result.path is not None and is_mirror(Path(result.path)) for result in wrong):
        return "Copy the mirror again, or run emb-provider mirror again where the hub can be reached."
    return "To download wrong files again: emb-provider verify --repair"


def _print_verification(result: Verification) -> None:
    name = f"{result.model_name} ({result.source})"
    if result.ok:
        out(f"{name}: ok, {format_size(result.files_size)}")
        return
    out(f"{name}: {result.state if result.state != 'complete' else 'differs'}")
    for finding in result.findings:
        out(f"  {finding.path}: {_PROBLEMS[finding.problem]}")
    for key in result.damaged_artifacts:
        out(f"  compiled form {key[:12]}: damaged")
