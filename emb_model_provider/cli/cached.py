"""`emb-provider list`, `show` and `verify`: what is on disk, and whether it is as it was fetched."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from emb_model_provider.cli.interrupt import until_interrupted
from emb_model_provider.cli.options import (
    ModelId,
    json_option,
    open_manager,
    progress_option,
    quiet_option,
    revision_option,
    source_option,
    spec_of,
    split_revision,
)
from emb_model_provider.cli.output import FAILED, out, pairs, print_json, say, table
from emb_model_provider.formatting import format_age, format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emb_model_provider.cli.progress import Mode, Reporter
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.management.types import CachedSnapshot, Verification
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
    from emb_model_provider.cli.output import MODEL_HEAD, model_info, model_row

    _, manager = open_manager()
    entries = manager.list(everything=everything)
    if as_json:
        print_json({"models": [model_info(entry) for entry in entries], "total_size": _total(entries)})
        return
    if quiet:
        for name in dict.fromkeys(entry.name for entry in entries):
            out(name)
        return
    out(table(MODEL_HEAD, [model_row(entry) for entry in entries]))
    if not entries:
        say("No model is here yet. To fetch one: emb-provider pull ID")


def _total(entries: Sequence[CachedSnapshot]) -> int:
    """Return the bytes of all models together; an artifact that serves two of them counts once."""
    artifacts = {artifact.key: artifact.size for entry in entries for artifact in entry.artifacts}
    return sum(entry.size for entry in entries) + sum(artifacts.values())


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
    from emb_model_provider.cli.output import model_info

    settings, manager = open_manager()
    found = _find(settings, manager, model, source, revision)
    told = [{**model_info(entry), "details": manager.inspect(entry)} for entry in found]
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
    from emb_model_provider.cli.output import verification_info
    from emb_model_provider.cli.progress import Reporter

    settings, manager = open_manager()
    if models:
        chosen = [entry for typed in models for entry in _find(settings, manager, typed, source, revision)]
    else:
        chosen = [entry for entry in manager.list() if source in (None, "auto", entry.hub)]

    def work() -> list[Verification]:
        with Reporter(progress) as report:
            return [_verified(settings, manager, entry, report, repair=repair) for entry in chosen]

    results = until_interrupted(work, "nothing was changed, or what was repaired is whole.")
    if as_json:
        print_json(verification_info(results))
    else:
        for result in results:
            _print_result(result)
        if not results:
            say("No model is here to be verified.")
    if not all(result.ok for result in results):
        if not repair:
            say("To fetch again what differs: emb-provider verify --repair")
        raise SystemExit(FAILED)


def _verified(
    settings: Settings, manager: ModelManager, entry: CachedSnapshot, report: Reporter, *, repair: bool
) -> Verification:
    report.model(entry.name)
    result = manager.verify(entry, on_progress=report)
    if result.ok or not repair:
        return result
    return _repaired(settings, manager, result, report)


def _repaired(
    settings: Settings, manager: ModelManager, result: Verification, report: Reporter
) -> Verification:
    """Fetch what differs, put away what was compiled and is damaged, and look again."""
    from emb_model_provider.errors import ProviderError

    entry = result.snapshot
    if result.findings and not entry.owns_files:
        report.note(f"{entry.name}: its files are not ours to repair. Put them back as they were, or rm it")
        return result
    if result.findings or entry.state != "complete":
        try:
            manager.ensure(spec_of(settings, entry), force=True, on_progress=report)
        except ProviderError as error:
            report.note(f"Error: {entry.name} could not be repaired: {error.message}")
            return result
    for key in result.damaged_artifacts:
        _put_away(settings, key, entry.name, report)
    again = manager.find(entry.name, source=entry.hub, revision=entry.asked_revision)
    return manager.verify(again[0], on_progress=report)


def _put_away(settings: Settings, key: str, name: str, report: Reporter) -> None:
    """Remove what was compiled and is damaged: whoever needs it next compiles it anew."""
    from emb_model_provider.artifacts.store import Stock

    stock = Stock(settings.cache_dir)
    held = stock.claim(key)
    if held is None:
        report.note(f"{name}: a process serves from its damaged compiled form: emb-provider unload {name}")
        return
    with held:
        stock.remove(key)
    report.note(
        f"{name}: its damaged compiled form is removed. The next start compiles it anew; now: emb-provider pull {name}"
    )


def _print_result(result: Verification) -> None:
    entry = result.snapshot
    if result.ok:
        out(f"{entry.name} ({entry.hub}): ok, {format_size(entry.size)}")
        return
    out(f"{entry.name} ({entry.hub}): {entry.state if entry.state != 'complete' else 'differs'}")
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
) -> list[CachedSnapshot]:
    """Raises: NotCachedError."""
    name, own = split_revision(settings, typed)
    return manager.find(name, source=source, revision=own or revision)
