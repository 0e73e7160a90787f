"""`emb-provider ps`, `load` and `unload`: models in the running server's memory."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import click

from emb_model_provider.cli.interrupt import run_until_interrupted
from emb_model_provider.cli.options import (
    ModelId,
    json_option,
    open_settings,
    precision_option,
    progress_option,
    quiet_option,
    revision_option,
    source_option,
    split_revision,
    url_option,
)
from emb_model_provider.cli.output import out, print_json, say, table
from emb_model_provider.errors import ProviderError
from emb_model_provider.formatting import format_size
from emb_model_provider.progress import Phase, Progress

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.cli.progress import CommandProgress, Mode
    from emb_model_provider.cli.server_client import ServerClient
    from emb_model_provider.model_spec import Precision, Source

_LOOK_S = 1.0
_GOES_ON = "the server goes on. To see it: emb-provider ps"
_HEAD = ("MODEL", "STATE", "PRECISION", "MEMORY", "QUEUE", "REQUESTS/S", "P95", "SERVED")


@click.command()
@url_option
@quiet_option("names of models that are loaded")
@json_option
def ps(url: str | None, *, quiet: bool, as_json: bool) -> None:
    """List the models of the running server.

    QUEUE is how many inputs wait; REQUESTS/S and P95, the time that 95 of 100 requests stay under, are of the last
    minute; SERVED counts requests since the start.

    JSON: what GET /api/models answers.
    """
    from emb_model_provider.cli.server_client import ServerClient

    answer = ServerClient(open_settings(), url).models()
    if as_json:
        print_json(answer)
        return
    if quiet:
        for one in answer["models"]:
            if one["state"] == "ready":
                out(one["alias"])
        return
    out(table(_HEAD, [_row(one) for one in answer["models"]]))
    for one in answer["models"]:
        if one.get("error"):
            say(f"{one['alias']}: {one['error']}")
    process = answer["process"]
    limit = f" of {format_size(process['memory_limit_bytes'])}" if process.get("memory_limit_bytes") else ""
    say(
        f"process {process['pid']}, version {process['version']}: {format_size(process['resident_bytes'])} in memory, "
        f"models {format_size(process['models_memory_bytes'])}{limit}"
    )


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    p95 = one.get("p95_s")
    return (
        one["alias"],
        one["state"],
        one.get("precision") or one.get("asked_precision") or "-",
        format_size(one.get("memory_bytes")),
        str(one.get("waiting_inputs", 0)),
        f"{one.get('requests_per_s') or 0:.1f}",
        f"{p95 * 1000:.0f} ms" if p95 is not None else "-",
        str(one.get("requests_served", 0)),
    )


@click.command()
@click.argument("model", type=ModelId(), metavar="ID[@REV]")
@click.option("--alias", metavar="NAME", help="The name that requests use. Default: as configured, or ID.")
@source_option
@revision_option
@precision_option
@click.option("--no-wait", is_flag=True, help="Do not wait until it is ready.")
@url_option
@progress_option
@json_option
def load(
    model: str,
    alias: str | None,
    source: Source | None,
    revision: str | None,
    precision: Precision | None,
    url: str | None,
    progress: Mode,
    *,
    no_wait: bool,
    as_json: bool,
) -> None:
    """Load a model into the running server.

    It fetches and compiles the model where that is needed. ID is one of the server's models, or a repository's id,
    which is then served until it is unloaded with --forget or the server ends.

    JSON: the model, as in `ps --json`.
    """
    from emb_model_provider.cli.server_client import ServerClient

    settings = open_settings()
    name, own = split_revision(settings, model)
    if own is not None and revision is not None:
        raise click.UsageError(f"{model} and --revision {revision}: say which revision once.")
    client = ServerClient(settings, url)

    def work() -> dict[str, Any]:
        return client.post(
            "/api/models/load",
            model_name=name,
            alias=alias,
            source=source,
            revision=own or revision,
            precision=precision,
            wait=not no_wait,
        )

    loaded = run_until_interrupted(lambda: _watched(client, {alias or name, name}, work, progress), _GOES_ON)
    _print(loaded, as_json=as_json)


@click.command()
@click.argument("model", type=ModelId(), metavar="ID")
@click.option(
    "--forget", is_flag=True, help="Serve it no more, either; only where it is not in the settings."
)
@url_option
@json_option
def unload(model: str, url: str | None, *, forget: bool, as_json: bool) -> None:
    """Unload a model from the running server.

    What it is answering is answered first. Its files stay. The next request for it loads it again.

    JSON: the model, as in `ps --json`.
    """
    from emb_model_provider.cli.server_client import ServerClient

    client = ServerClient(open_settings(), url)
    done = run_until_interrupted(
        lambda: client.post("/api/models/unload", model_name=model, forget=forget), _GOES_ON
    )
    _print(done, as_json=as_json)


def _print(model: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(model)
        return
    memory = f", {format_size(model['memory_bytes'])}" if model.get("memory_bytes") else ""
    out(f"{model['alias']}: {model['state']}{memory}")


def _watched(
    client: ServerClient, names: set[str], work: Callable[[], dict[str, Any]], progress: Mode
) -> dict[str, Any]:
    """Do what may take minutes, and show meanwhile what the model is doing."""
    from emb_model_provider.cli.progress import CommandProgress

    done = threading.Event()
    with CommandProgress(progress) as report:
        watcher = threading.Thread(target=_watch, args=(client, names, report, done), daemon=True)
        watcher.start()
        try:
            return work()
        finally:
            done.set()
            watcher.join()


def _watch(client: ServerClient, names: set[str], report: CommandProgress, done: threading.Event) -> None:
    phases: dict[str, Phase] = {"downloading": "download", "compiling": "compile", "loading": "load"}
    while not done.wait(_LOOK_S):
        try:
            models = client.models()["models"]
        except ProviderError:
            continue  # whoever waits for the answer itself hears of it
        for one in models:
            if names & {one["alias"], one["model_name"]} and one["state"] in phases:
                report.model(one["alias"])
                report(Progress(phases[one["state"]], one["model_name"]))
