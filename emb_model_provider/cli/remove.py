"""`emb-provider rm` and `prune`: remove models from disk, unless they are in use."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import click

from emb_model_provider.cli import options
from emb_model_provider.cli.interrupt import run_until_interrupted
from emb_model_provider.cli.output import confirm, out, print_json, say
from emb_model_provider.error_table import USAGE_ERROR
from emb_model_provider.formatting import format_size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emb_model_provider.cli.server_client import ServerClient
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.management.types import Removal
    from emb_model_provider.model_spec import Source

_INTERRUPTED = "some of it may be removed already. To see what is left: emb-provider list"
_KEEPS_FILES = ("local", "bundled")
"""Sources whose files are never removed, only what was compiled from them."""
_Names = list[tuple[str, str | None]]
"""Names and revisions; empty for all models."""


@click.command()
@click.argument("models", nargs=-1, type=options.ModelId(), metavar="[ID[@REV]]...")
@click.option("--all", "everything", is_flag=True, help="Remove all models that are listed.")
@options.source
@options.revision
@click.option("--wait", "wait_s", type=click.FloatRange(0, 3600), default=0.0, metavar="SECONDS",
              help="How long to wait for a model that is in use. Default: not at all.")  # fmt: skip
@click.option(
    "--unload",
    is_flag=True,
    help="Let the running server unload the models after their pending requests, and remove them.",
)
@options.url
@options.dry_run
@options.yes
@options.quiet("the ids of removed models")
@options.json
def rm(
    models: tuple[str, ...],
    source: Source | None,
    revision: str | None,
    wait_s: float,
    url: str | None,
    *,
    everything: bool,
    unload: bool,
    dry_run: bool,
    yes: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Remove models from disk.

    Their compiled forms are removed, too.

    If a process uses one of the models, none is removed and the exit code is 2; with --all the others are removed. The
    files of a directory and of the bundled model are kept. With --unload the running server removes the models from its
    own caches.

    JSON: {"dry_run", "models": [as in list], "artifacts": [keys], "freed": bytes, "kept": [models, each with its
    reason], "unloaded": [aliases]}.
    """
    if bool(models) == everything:
        raise click.UsageError("Name the models to remove (see emb-provider list), or add --all.")
    if everything and (source is not None or revision is not None):
        raise click.UsageError("--all cannot be combined with --source or --revision.")
    if url is not None and not unload:
        raise click.UsageError("--url requires --unload, because without it the models on this disk are removed.")
    settings, manager = options.open_manager()
    names = list(dict.fromkeys(options.split_revision(settings, argument, revision) for argument in models))
    if unload:
        from emb_model_provider.cli.server_client import ServerClient

        remove = partial(_remove_on_server, ServerClient(settings, url), names, source, wait_s)
    else:
        remove = partial(_remove, manager, names, source, wait_s)
    waits = wait_s > 0 and not unload and not dry_run
    # What is in use now is released, or else the removal fails.
    result = (
        _remove(manager, names, source, 0, dry_run=True, released=_paths(manager)) if waits else remove(dry_run=True)
    )
    if not dry_run and not _is_empty(result):
        _confirm(result, yes=yes)
        result = run_until_interrupted(partial(remove, dry_run=False), _INTERRUPTED)
    _print({**result, "dry_run": dry_run}, quiet=quiet, as_json=as_json)


@click.command()
@options.dry_run
@options.yes
@options.quiet("the ids of removed models")
@options.json
def prune(*, dry_run: bool, yes: bool, quiet: bool, as_json: bool) -> None:
    """Remove leftovers that cannot be used.

    These are interrupted downloads, and compiled forms whose model is no longer on disk.

    JSON: as for rm.
    """
    _, manager = options.open_manager()
    result = _to_json(manager.prune(dry_run=True), dry_run=True)
    if not dry_run:
        _confirm(result, yes=yes)
        removal = run_until_interrupted(lambda: manager.prune(dry_run=False), _INTERRUPTED)
        result = _to_json(removal, dry_run=False)
    _print(result, quiet=quiet, as_json=as_json)


def _paths(manager: ModelManager) -> list[Path | None]:
    return [Path(model.path) if model.path is not None else None for model in manager.list()]


def _remove(
    manager: ModelManager,
    names: _Names,
    source: Source | None,
    wait_s: float,
    *,
    dry_run: bool,
    released: Sequence[Path | None] = (),
) -> dict[str, Any]:
    if names:
        removal = manager.remove_together(names, source=source, wait_s=wait_s, dry_run=dry_run, released=released)
    else:
        removal = manager.remove_all(wait_s=wait_s, dry_run=dry_run, released=released)
    return _to_json(removal, dry_run=dry_run)


def _remove_on_server(
    client: ServerClient, names: _Names, source: Source | None, wait_s: float, *, dry_run: bool
) -> dict[str, Any]:
    parameters = {"wait_s": wait_s, "unload": True, "dry_run": dry_run}
    if not names:
        return client.request("DELETE", "/api/models/cache/all", **parameters)
    first, *others = [
        client.request(
            "DELETE", f"/api/models/cache/{quote(name, safe='')}", source=source, revision=revision, **parameters
        )
        for name, revision in names
    ]
    for other in others:
        for key in ("models", "artifacts", "kept", "unloaded", "freed"):
            first[key] += other[key]
    return first


def _to_json(removal: Removal, *, dry_run: bool) -> dict[str, Any]:
    """Return a removal with the fields of the response of DELETE /api/models/cache."""
    return {"dry_run": dry_run, **removal.model_dump(mode="json"), "unloaded": []}


def _is_empty(result: dict[str, Any]) -> bool:
    return not (result["models"] or result["artifacts"] or result["freed"])


def _confirm(result: dict[str, Any], *, yes: bool) -> None:
    """Ask before models or compiled forms are removed, but not if there are only partial files."""
    names = dict.fromkeys(model["model_name"] for model in result["models"])
    if not names and not result["artifacts"]:
        return
    content = ", ".join(names) or f"{len(result['artifacts'])} compiled form(s) without a model"
    confirm(f"Remove {content} ({format_size(result['freed'])})?", yes=yes)


def _print(result: dict[str, Any], *, quiet: bool, as_json: bool) -> None:
    """Print what was or would be removed; exit with 2 if something was kept."""
    dry_run = result["dry_run"]
    verb = "would remove" if dry_run else "removed"
    if as_json:
        print_json(result)
    else:
        for model in result["models"]:
            hint = "; its files are kept" if model["source"] in _KEEPS_FILES else ""
            about = f" ({model['source']}, {format_size(model['size'])}{hint})"
            out(model["model_name"] if quiet else f"{verb} {model['model_name']}{about}")
        if result["artifacts"] and not quiet:
            out(f"{verb} {len(result['artifacts'])} compiled form(s)")
    if not quiet or result["kept"]:
        for model in result["kept"]:
            say(f"kept {model['model_name']}: {model['reason']}")
        if _is_empty(result):
            say("There is nothing to remove.")
        else:
            say(f"{format_size(result['freed'])} {'would be freed' if dry_run else 'freed'}")
    if result["kept"] and not dry_run:
        raise SystemExit(USAGE_ERROR)
