"""`emb-provider mirror`: a directory with a model and everything that it needs, for networks without a hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from emb_model_provider.cli import options
from emb_model_provider.cli.interrupt import RESUME_HINT, run_until_interrupted
from emb_model_provider.cli.output import out, pairs, print_json, say, show_progress
from emb_model_provider.formatting import format_size

if TYPE_CHECKING:
    from emb_model_provider.model_spec import Source
    from emb_model_provider.progress import Mode
    from emb_model_provider.snapshots.mirror import Mirror, MirrorChanges


@click.command()
@click.argument("model", type=options.ModelId(), metavar="ID[@REV]")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path), metavar="DIR")
@options.source
@options.revision
@click.option("--force", is_flag=True, help="Ask the hub again, and download what has changed.")
@options.progress
@options.quiet("the directory")
@options.json
def mirror(
    model: str,
    directory: Path,
    source: Source | None,
    revision: str | None,
    progress: Mode,
    *,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Copy a model with everything that it needs into a directory.

    DIR can then be copied to a machine without access to a hub, verified there (`verify DIR`) and served (`serve DIR`).
    It contains the base model of an adapter, code of other repositories if it may run, and a manifest with the hash of
    every file, which is written last. DIR must be empty, or a mirror of the same repository: then only what has changed
    is replaced, and an interrupted command continues where it stopped.

    JSON: {name, model_name, source, revision, directory, files, size, copied_files, copied_bytes, removed: [path]}.
    """
    from emb_model_provider.model_resolver import resolve_model

    settings, manager = options.open_manager()
    name, revision = options.split_single_revision(settings, model, revision)
    spec = resolve_model(settings, name, source=source, revision=revision)

    def work() -> tuple[Mirror, MirrorChanges]:
        with show_progress("none" if quiet and progress == "auto" else progress) as report:
            report.model(spec.alias)
            return manager.mirror(spec, directory, force=force, on_progress=report)

    mirrored, changes = run_until_interrupted(work, RESUME_HINT)
    result = _to_json(mirrored, changes)
    if as_json:
        print_json(result)
    elif quiet:
        out(result["directory"])
    else:
        out(f"{mirrored.name} ({mirrored.snapshot.hub}, {mirrored.snapshot.revision})")
        out(pairs(_describe(result)))
        say(f"To check a copy: emb-provider verify {directory}   To serve it: emb-provider serve {directory}")


def _to_json(mirrored: Mirror, changes: MirrorChanges) -> dict[str, Any]:
    snapshot = mirrored.snapshot
    return {
        "name": mirrored.name,
        "model_name": snapshot.repository,
        "source": snapshot.hub,
        "revision": snapshot.revision,
        "directory": str(snapshot.path),
        "files": len(mirrored.files),
        "size": snapshot.size,
        "copied_files": changes.copied,
        "copied_bytes": changes.copied_bytes,
        "removed": list(changes.removed),
    }


def _describe(result: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [
        ("mirror", result["directory"]),
        ("size", f"{format_size(result['size'])} in {result['files']} files"),
        ("copied", f"{format_size(result['copied_bytes'])} in {result['copied_files']} files"),
    ]
    if result["removed"]:
        lines.append(("removed", f"{len(result['removed'])} files of the earlier version"))
    return lines
