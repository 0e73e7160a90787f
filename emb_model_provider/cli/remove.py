"""`emb-provider rm` and `prune`: models off the disk, never one that is in use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from emb_model_provider.cli.interrupt import run_until_interrupted
from emb_model_provider.cli.options import (
    ModelId,
    dry_run_option,
    json_option,
    open_manager,
    quiet_option,
    revision_option,
    source_option,
    split_revision,
    url_option,
    yes_option,
)
from emb_model_provider.cli.output import confirm, out, print_json, removal_info, say
from emb_model_provider.error_table import USAGE_ERROR
from emb_model_provider.formatting import format_size
from emb_model_provider.management.types import Removal

if TYPE_CHECKING:
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.model_spec import Source
    from emb_model_provider.settings import Settings

_UNFINISHED = "what was not removed yet is still there. To see it: emb-provider list"


@click.command()
@click.argument("models", nargs=-1, type=ModelId(), metavar="[ID[@REV]]...")
@click.option("--all", "everything", is_flag=True, help="All models that are listed.")
@source_option
@revision_option
@click.option("--wait", "wait_s", type=click.FloatRange(0, 3600), default=0.0, metavar="SECONDS",
              help="How long to wait for a model that is in use. Default: not at all.")  # fmt: skip
@click.option(
    "--unload",
    is_flag=True,
    help="Let the running server unload them, after what it is answering, and remove them.",
)
@url_option
@dry_run_option
@yes_option
@quiet_option("the ids of what was removed")
@json_option
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
    """Remove models from the disk.

    What was compiled from them goes, too.

    Where one of them is in use, in whatever process, none is removed, and the exit status is 2; --all removes the
    others. A directory of your own and the bundled model keep their files. With --unload the running server does it,
    in its own caches.

    JSON: {"dry_run", "models": [as in list], "artifacts": [keys], "freed": bytes, "kept": [models, each with its
    reason], "unloaded": [aliases]}.
    """
    if bool(models) == everything:
        raise click.UsageError("Say which models to remove (emb-provider list), or --all.")
    if everything and (source is not None or revision is not None):
        raise click.UsageError("--all goes without --source and --revision.")
    if url is not None and not unload:
        raise click.UsageError(
            "--url goes with --unload: without it this machine's disk is meant, not a server's."
        )
    settings, manager = open_manager()
    chosen = [split_revision(settings, typed) for typed in models]
    names = list(dict.fromkeys((name, own or revision) for name, own in chosen))
    remover: _LocalRemoval | _RemoteRemoval
    if unload:
        remover = _RemoteRemoval(settings, url, names, source, wait_s)
    else:
        remover = _LocalRemoval(manager, names, source, wait_s)
    plan = remover.remove(dry_run=True) if dry_run else remover.plan()
    if not dry_run and _is_some(plan):
        confirm(f"Remove {_told(plan)} ({format_size(plan['freed'])})?", yes=yes)
        plan = run_until_interrupted(lambda: remover.remove(dry_run=False), _UNFINISHED)
    _print({**plan, "dry_run": dry_run}, quiet=quiet, as_json=as_json)


@click.command()
@dry_run_option
@yes_option
@quiet_option("the ids of what was removed")
@json_option
def prune(*, dry_run: bool, yes: bool, quiet: bool, as_json: bool) -> None:
    """Remove leftovers that nobody can use.

    Fetches that were broken off, and compiled forms whose model is gone.

    JSON: as of rm.
    """
    _, manager = open_manager()
    plan = removal_info([manager.prune(dry_run=True)], dry_run=True)
    if not dry_run:
        if _is_some(plan):
            confirm(f"Remove {_told(plan)} ({format_size(plan['freed'])})?", yes=yes)
        # Also where no model and no compiled form is named: parts of files may lie beside a model that is whole.
        pruned = run_until_interrupted(lambda: manager.prune(dry_run=False), _UNFINISHED)
        plan = removal_info([pruned], dry_run=False)
    _print(plan, quiet=quiet, as_json=as_json)


def _is_some(plan: dict[str, Any]) -> bool:
    return bool(plan["models"] or plan["artifacts"])


def _told(plan: dict[str, Any]) -> str:
    """Return for a question what is to be removed: models by their names, else how much was compiled."""
    names = dict.fromkeys(one["model_name"] for one in plan["models"])
    return ", ".join(names) or f"{len(plan['artifacts'])} compiled form(s) whose model is gone"


class _LocalRemoval:
    """Removes on this machine's disk, under the locks that every process of ours takes."""

    def __init__(
        self, manager: ModelManager, names: list[tuple[str, str | None]], source: Source | None, wait_s: float
    ) -> None:
        self._manager = manager
        self._names = names
        self._source = source
        self._wait_s = wait_s

    def plan(self) -> dict[str, Any]:
        """Return what is to be removed, as of a dry run; what may be waited for may be in use.

        Raises: NotCachedError; ModelInUseError.
        """
        if self._wait_s == 0:
            return self.remove(dry_run=True)
        found = [
            entry
            for name, revision in self._names
            for entry in self._manager.find(name, source=self._source, revision=revision)
        ]
        if not self._names:
            found = self._manager.list()
        freed = sum(
            model.size - (model.files_size if model.source in ("local", "bundled") else 0) for model in found
        )
        return removal_info([Removal(models=found, artifacts=[], freed=freed, kept=[])], dry_run=True)

    def remove(self, *, dry_run: bool) -> dict[str, Any]:
        """Remove the models, or all there are without names; of several nothing where one can be seen to be in use.

        Raises: NotCachedError; ModelInUseError.
        """
        if not self._names:
            removed = [self._manager.remove_all(wait_s=self._wait_s, dry_run=dry_run)]
            return removal_info(removed, dry_run=dry_run)
        if self._wait_s == 0 and not dry_run:
            self._each(dry_run=True)
        return removal_info(self._each(dry_run=dry_run), dry_run=dry_run)

    def _each(self, *, dry_run: bool) -> list[Removal]:
        return [
            self._manager.remove(
                name, source=self._source, revision=revision, wait_s=self._wait_s, dry_run=dry_run
            )
            for name, revision in self._names
        ]


class _RemoteRemoval:
    """Lets the running server remove, which can unload what it serves."""

    def __init__(
        self,
        settings: Settings,
        url: str | None,
        names: list[tuple[str, str | None]],
        source: Source | None,
        wait_s: float,
    ) -> None:
        from emb_model_provider.cli.server_client import ServerClient

        self._client = ServerClient(settings, url)
        self._names = names
        self._source = source
        self._wait_s = wait_s

    def plan(self) -> dict[str, Any]:
        """Raises: OutOfReachError, RefusedError."""
        return self.remove(dry_run=True)

    def remove(self, *, dry_run: bool) -> dict[str, Any]:
        """Raises: OutOfReachError, RefusedError."""
        common = {"wait_s": self._wait_s, "unload": True, "dry_run": dry_run}
        if not self._names:
            return self._client.delete("/api/models/cache/all", **common)
        answers = [
            self._client.delete(_path(name), source=self._source, revision=revision, **common)
            for name, revision in self._names
        ]
        first, *others = answers
        for other in others:
            for part in ("models", "artifacts", "kept", "unloaded"):
                first[part] += other[part]
            first["freed"] += other["freed"]
        return first


def _path(name: str) -> str:
    from urllib.parse import quote

    return f"/api/models/cache/{quote(name, safe='')}"


def _print(plan: dict[str, Any], *, quiet: bool, as_json: bool) -> None:
    """Print what was removed, or of a dry run what would be; the exit status says whether something was kept."""
    dry_run = plan["dry_run"]
    if as_json:
        print_json(plan)
    else:
        for one in plan["models"]:
            stay = "; its files stay" if one["source"] in ("local", "bundled") else ""
            about = f" ({one['source']}, {format_size(one['size'])}{stay})"
            out(one["model_name"] if quiet else f"{_verb(dry_run)} {one['model_name']}{about}")
        if plan["artifacts"] and not quiet:
            out(f"{_verb(dry_run)} {len(plan['artifacts'])} compiled form(s)")
    if not quiet or plan["kept"]:
        for one in plan["kept"]:
            say(f"kept {one['model_name']}: {one['reason']}")
        if not _is_some(plan) and not plan["freed"]:
            say("There is nothing to remove.")
        else:
            say(f"{format_size(plan['freed'])} {'would be' if dry_run else 'are'} free again")
    if plan["kept"] and not dry_run:
        raise SystemExit(USAGE_ERROR)


def _verb(dry_run: bool) -> str:
    return "would remove" if dry_run else "removed"
