"""`emb-provider pull`: downloads, verifies and compiles models ahead of time."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emb_model_provider.cli import options
from emb_model_provider.cli.interrupt import RESUME_HINT, run_until_interrupted
from emb_model_provider.cli.output import error_as_json, exit_code_of, out, pairs, print_json, say, show_progress, warn
from emb_model_provider.errors import OperationCancelledError, ProviderError
from emb_model_provider.formatting import format_cosine, format_size, precision_label
from emb_model_provider.progress import CancelToken, Mode, ProgressReporter
from emb_model_provider.snapshots.snapshot import parts_of

if TYPE_CHECKING:
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.management.types import CompiledModel
    from emb_model_provider.model_spec import ModelSpec, Precision, Source
    from emb_model_provider.snapshots.snapshot import Snapshot

_COMPILER_STOP_S = 30.0
"""Longest wait for the compiler to end after an interrupt. It takes a fraction of a second."""


@click.command()
@click.argument("models", nargs=-1, type=options.ModelId(), metavar="[ID[@REV]]...")
@options.source
@options.revision
@options.precision
@click.option("--force", is_flag=True, help="Ask the hub again, and download what has changed.")
@click.option("--no-compile", is_flag=True, help="Download and verify only.")
@click.option(
    "--include",
    multiple=True,
    metavar="PATTERN",
    help="Download only matching files, among those that serving needs. Can be repeated.",
)
@click.option("--exclude", multiple=True, metavar="PATTERN", help="Do not download matching files. Can be repeated.")
@click.option("--to", "directory", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Also make DIR a mirror of the model, as `mirror` does.")  # fmt: skip
@options.progress
@options.quiet("the directories of the files")
@options.json
def pull(
    models: tuple[str, ...],
    source: Source | None,
    revision: str | None,
    precision: Precision | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
    directory: Path | None,
    progress: Mode,
    *,
    force: bool,
    no_compile: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Download, verify and compile models.

    The service then starts quickly, and without a request to a hub. Without ID, all models of the settings are
    downloaded. ID is an alias of the settings, a repository id or a directory; REV is a branch, tag or commit. Models
    that are complete are not downloaded again, and an interrupted command continues where it stopped. With --include or
    --exclude nothing is compiled.

    JSON: {"models": [{model_name, alias, source, revision, path, files, size, compiled: {backend, size, precision,
    computed, fidelity, notes} or null, copied_to}], "failed": [{alias, error: {code, message}}]}.
    """
    from emb_model_provider.model_resolver import resolve_model

    settings, manager = options.open_manager()
    if revision is not None and len(models) != 1:
        raise click.UsageError("--revision requires exactly one ID. For several, write ID@REV.")
    if directory is not None and len(models) != 1:
        raise click.UsageError("--to requires exactly one ID.")
    specs: dict[str, ModelSpec] = {}
    for argument in models or [spec.alias for spec in settings.models.specs()]:
        name, wanted = options.split_single_revision(settings, argument, revision)
        specs[argument] = resolve_model(settings, name, source=source, revision=wanted, precision=precision)
    task = _PullTask(manager, force, include, exclude, directory, compiles=not (no_compile or include or exclude))
    failures: list[tuple[ModelSpec, ProviderError]] = []
    results: dict[str, dict[str, Any]] = {}

    def work() -> None:
        with show_progress("none" if quiet and progress == "auto" else progress) as report:
            for argument, spec in specs.items():
                try:
                    results[argument] = task.run(spec, report)
                except OperationCancelledError:
                    return  # interrupted: the process ends
                except ProviderError as error:
                    failures.append((spec, error))
                    if len(specs) > 1:
                        report.note(f"Error: {spec.alias}: {error.message}")

    run_until_interrupted(work, RESUME_HINT, stop=task.stop)
    if failures and len(specs) == 1:
        raise failures[0][1]
    failed = [{"alias": spec.alias, "error": error_as_json(error)} for spec, error in failures]
    _print([*results.values()], failed, quiet=quiet, as_json=as_json)
    if results and not quiet and not as_json:
        served = [str(directory)] if directory is not None else [*results] if models else []
        kept = {"source": source, "revision": revision, "precision": precision} if served and directory is None else {}
        flags = [text for name, value in kept.items() if value is not None for text in (f"--{name}", value)]
        say(f"To serve: {shlex.join(['emb-provider', 'serve', *served, *flags])}")
    if failures:
        raise SystemExit(max(exit_code_of(error) for _, error in failures))


@dataclass(slots=True)
class _PullTask:
    manager: ModelManager
    force: bool
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    directory: Path | None
    compiles: bool
    is_compiling: bool = False
    cancel: CancelToken = field(default_factory=CancelToken)
    """Ends the compiler. A download is not cancelled, because that would remove what was downloaded so far."""

    def stop(self) -> float:
        """Stop the compiler, which removes its files, and return how many seconds that may take."""
        self.cancel.cancel()
        return _COMPILER_STOP_S if self.is_compiling else 0.0

    def run(self, spec: ModelSpec, report: ProgressReporter) -> dict[str, Any]:
        self.is_compiling = False
        report.model(spec.alias)
        snapshot = self.manager.ensure(
            spec, force=self.force, include=self.include, exclude=self.exclude, on_progress=report
        )
        copy = (
            self.manager.copy_to(spec, snapshot, self.directory, on_progress=report)
            if self.directory is not None
            else None
        )
        compiled = None
        if self.compiles:
            self.is_compiling = True
            compiled = self.manager.compile(spec, on_progress=report, cancel=self.cancel)
        report.done()
        return _to_json(spec, snapshot, compiled, copy)


def _to_json(spec: ModelSpec, snapshot: Snapshot, compiled: CompiledModel | None, copy: Path | None) -> dict[str, Any]:
    return {
        "model_name": snapshot.repository,
        "alias": spec.alias,
        "source": snapshot.hub,
        "revision": snapshot.revision,
        "path": str(snapshot.path),
        "files": sum(len(part.files) for part in parts_of(snapshot)),
        "size": snapshot.size,
        "compiled": _compiled_to_json(compiled) if compiled is not None else None,
        "copied_to": str(copy) if copy is not None else None,
    }


def _compiled_to_json(compiled: CompiledModel) -> dict[str, Any]:
    from emb_model_provider.management.types import FidelityObject  # pydantic takes long to import

    values = {"backend": compiled.backend, "size": compiled.size, "precision": None, "computed": None, "fidelity": None}
    description = compiled.description
    if description is None:
        return {**values, "notes": [*compiled.notes]}
    return {
        **values,
        "precision": description.precision,
        "computed": description.compute or description.precision,
        "fidelity": (fidelity := FidelityObject.of(description.fidelity)) and fidelity.model_dump(),
        "notes": [*description.notes, *compiled.notes],
    }


def _print(results: list[dict[str, Any]], failed: list[dict[str, Any]], *, quiet: bool, as_json: bool) -> None:
    for result in results:
        for note in (result["compiled"] or {}).get("notes", ()):
            warn(f"{result['alias']}: {note}")
    if as_json:
        print_json({"models": results, "failed": failed})
        return
    for result in results:
        if quiet:
            out(result["copied_to"] or result["path"])
        else:
            out(f"{result['alias']} ({result['source']}, {result['revision']})")
            out(pairs(_describe(result)))


def _describe(result: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [("path", result["path"]), ("size", f"{format_size(result['size'])} in {result['files']} files")]
    compiled = result["compiled"]
    if compiled is not None and compiled["backend"] == "openvino":
        label = precision_label(compiled["precision"], compiled["computed"])
        lines.append(("compiled", f"{label}, {format_size(compiled['size'])}"))
        fidelity = compiled["fidelity"]
        if fidelity is not None:
            for output, value in fidelity["agreement"].items():
                what = "lowest cosine to fp32" if output == "dense" else f"agreement of {output} with fp32"
                lines.append(("fidelity", f"{format_cosine(value)} ({what}, over {fidelity['texts']} texts)"))
    elif compiled is not None:
        lines.append(("compiled", f"no: the {compiled['backend']} backend serves the model from its files"))
    if result["copied_to"] is not None:
        lines.append(("copied to", result["copied_to"]))
    return lines
