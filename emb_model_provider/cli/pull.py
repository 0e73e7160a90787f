"""`emb-provider pull`: files fetched, verified and compiled ahead of time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emb_model_provider.cli.interrupt import GO_ON, run_until_interrupted
from emb_model_provider.cli.options import (
    ModelId,
    json_option,
    open_manager,
    precision_option,
    progress_option,
    quiet_option,
    revision_option,
    source_option,
    split_revision,
)
from emb_model_provider.cli.output import exit_code_of, out, pairs, print_json, say, warn
from emb_model_provider.errors import ProviderError
from emb_model_provider.formatting import format_size
from emb_model_provider.progress import CancelToken

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emb_model_provider.cli.progress import CommandProgress, Mode
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.management.types import CompiledModel
    from emb_model_provider.model_spec import ModelSpec, Precision, Source
    from emb_model_provider.snapshots.snapshot import Snapshot

_STOP_S = 30.0
"""The longest wait for a compile step to be gone, which takes a fraction of a second."""


@click.command()
@click.argument("models", nargs=-1, type=ModelId(), metavar="[ID[@REV]]...")
@source_option
@revision_option
@precision_option
@click.option("--force", is_flag=True, help="Ask the hub again, and fetch what changed.")
@click.option("--no-compile", is_flag=True, help="Fetch and verify only.")
@click.option(
    "--include", multiple=True, metavar="PATTERN", help="Of the files that serving needs, these only."
)
@click.option(
    "--exclude", multiple=True, metavar="PATTERN", help="Not these; either may be given several times."
)
@click.option("--to", "directory", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
              help="Also copy the files to DIR, which can be served from: EMB_PROVIDER_MODEL_PATH.")  # fmt: skip
@progress_option
@quiet_option("the directories of the files")
@json_option
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
    """Fetch, verify and compile models.

    The first start is then quick, and asks no hub. Without ID all models of your settings are fetched. ID is an alias
    of your settings, a repository's id or a directory; REV is a branch, tag or commit. What is here already is not
    fetched again, and a command that was interrupted goes on where it was. With --include or --exclude nothing is
    compiled.

    JSON: {"models": [{model_name, alias, source, revision, path, files, size, compiled: {backend, size, precision,
    computed, fidelity, notes} or null, copied_to}]}.
    """
    from emb_model_provider.cli.progress import CommandProgress
    from emb_model_provider.model_resolver import resolve_model

    settings, manager = open_manager()
    if revision is not None and len(models) != 1:
        raise click.UsageError("--revision goes with one ID: write ID@REV for several.")
    if directory is not None and len(models) != 1:
        raise click.UsageError("--to goes with one ID.")
    specs = []
    for typed in models or [spec.alias for spec in settings.models.specs()]:
        name, own = split_revision(settings, typed)
        if own is not None and revision is not None:
            raise click.UsageError(f"{typed} and --revision {revision}: say which revision once.")
        specs.append(
            resolve_model(settings, name, source=source, revision=own or revision, precision=precision)
        )
    task = _Pulling(
        manager, force, include, exclude, directory, compiles=not (no_compile or include or exclude)
    )
    failures: list[ProviderError] = []
    done: list[dict[str, Any]] = []

    def work() -> None:
        with CommandProgress("none" if quiet and progress == "auto" else progress) as report:
            for spec in specs:
                try:
                    done.append(task.pull(spec, report))
                except ProviderError as error:
                    failures.append(error)
                    if len(specs) > 1:
                        report.note(f"Error: {spec.alias}: {error.message}")

    run_until_interrupted(work, GO_ON, stop=task.stop)
    if failures and len(specs) == 1:
        raise failures[0]
    _print(done, quiet=quiet, as_json=as_json)
    if failures:
        raise SystemExit(max(exit_code_of(error) for error in failures))


class _Pulling:
    """What is done with each model."""

    def __init__(
        self,
        manager: ModelManager,
        force: bool,
        include: Sequence[str],
        exclude: Sequence[str],
        directory: Path | None,
        *,
        compiles: bool,
    ) -> None:
        self._manager = manager
        self._force = force
        self._include = include
        self._exclude = exclude
        self._directory = directory
        self._compiles = compiles
        self._compiling = False
        self._cancel = CancelToken()

    def stop(self) -> float:
        """Give up compiling, which takes its half-made files along; return how many seconds that may take."""
        self._cancel.cancel()
        return _STOP_S if self._compiling else 0.0

    def pull(self, spec: ModelSpec, report: CommandProgress) -> dict[str, Any]:
        """Raises: HubError, LoadError."""
        self._compiling = False
        report.model(spec.alias)
        snapshot = self._manager.ensure(
            spec,
            force=self._force,
            include=self._include,
            exclude=self._exclude,
            on_progress=report,
        )
        copied = self._manager.copy_to(snapshot, self._directory) if self._directory is not None else None
        compiled = None
        if self._compiles:
            self._compiling = True
            compiled = self._manager.compile(spec, on_progress=report, cancel=self._cancel)
        report.done()
        return _told(spec, snapshot, compiled, copied)


def _told(
    spec: ModelSpec, snapshot: Snapshot, compiled: CompiledModel | None, copied: Path | None
) -> dict[str, Any]:
    from dataclasses import asdict

    made: dict[str, Any] | None = None
    if compiled is not None:
        described = compiled.description
        made = {
            "backend": compiled.backend,
            "size": compiled.size,
            "precision": described.precision if described is not None else None,
            "computed": (described.compute or described.precision) if described is not None else None,
            "fidelity": asdict(described.fidelity) if described is not None and described.fidelity else None,
            "notes": [*(described.notes if described is not None else ()), *compiled.notes],
        }
    return {
        "model_name": snapshot.repository,
        "alias": spec.alias,
        "source": snapshot.hub,
        "revision": snapshot.revision,
        "path": str(snapshot.path),
        "files": len(snapshot.files),
        "size": sum(file.size for file in snapshot.files),
        "compiled": made,
        "copied_to": str(copied) if copied is not None else None,
    }


def _print(done: list[dict[str, Any]], *, quiet: bool, as_json: bool) -> None:
    for one in done:
        for note in (one["compiled"] or {}).get("notes", ()):
            warn(f"{one['alias']}: {note}")
    if as_json:
        print_json({"models": done})
        return
    for one in done:
        if quiet:
            out(one["copied_to"] or one["path"])
        else:
            out(f"{one['alias']} ({one['source']}, {one['revision']})")
            out(pairs(_lines(one)))
    if done and not quiet:
        say("Serve with: emb-provider serve")


def _lines(one: dict[str, Any]) -> list[tuple[str, str]]:
    from emb_model_provider.cli.output import precision_label
    from emb_model_provider.formatting import format_cosine

    lines = [("path", one["path"]), ("size", f"{format_size(one['size'])} in {one['files']} files")]
    made = one["compiled"]
    if made is not None and made["backend"] == "openvino":
        lines.append(
            (
                "compiled",
                f"{precision_label(made['precision'], made['computed'])}, {format_size(made['size'])}",
            )
        )
        if made["fidelity"] is not None:
            cosine = format_cosine(made["fidelity"]["min_cosine"])
            lines.append(
                ("fidelity", f"{cosine} (lowest cosine to fp32, over {made['fidelity']['texts']} texts)")
            )
    elif made is not None:
        lines.append(("compiled", "no: the torch backend serves it from its files"))
    if one["copied_to"] is not None:
        lines.append(("copied to", one["copied_to"]))
        lines.append(("to serve it", f"EMB_PROVIDER_MODEL_PATH={one['copied_to']}"))
    elif one["source"] == "local":
        lines.append(("to serve it", f"EMB_PROVIDER_MODEL_PATH={one['path']}"))
    else:
        lines.append(
            (
                "to serve it",
                f"EMB_PROVIDER_MODEL_NAME={one['model_name']} EMB_PROVIDER_MODEL_SOURCE={one['source']}",
            )
        )
    return lines
