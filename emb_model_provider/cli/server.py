"""`emb-provider ps`, `load` and `unload`: the models in the memory of the running server."""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import click

from emb_model_provider.cli import options
from emb_model_provider.cli.interrupt import run_until_interrupted
from emb_model_provider.cli.output import out, print_json, say, show_progress, table
from emb_model_provider.errors import ProviderError
from emb_model_provider.formatting import format_size
from emb_model_provider.progress import Mode, Phase, Progress, ProgressReporter

if TYPE_CHECKING:
    from collections.abc import Iterator

    from emb_model_provider.cli.server_client import ServerClient
    from emb_model_provider.model_spec import Precision, Source

_POLL_S = 1.0
_INTERRUPTED = "the server continues. To see its models: emb-provider ps"
_HEAD = ("MODEL", "STATE", "PRECISION", "MEMORY", "QUEUE", "REQUESTS/S", "P95", "SERVED")
_PHASES: dict[str, Phase] = {"downloading": "download", "compiling": "compile", "loading": "load"}
"""States of a model to the phases that are shown."""


@click.command()
@options.url
@options.quiet("the names of loaded models")
@options.json
def ps(url: str | None, *, quiet: bool, as_json: bool) -> None:
    """List the models of the running server.

    QUEUE is the number of inputs that wait. REQUESTS/S and P95 (95 % of the requests took at most that long) are of the
    last minute. SERVED is the number of requests since the server started.

    JSON: the response of GET /api/models.
    """
    from emb_model_provider.cli.server_client import ServerClient

    response = ServerClient(options.open_settings(), url).models()
    models = response["models"]
    if as_json:
        print_json(response)
        return
    if quiet:
        for model in models:
            if model["state"] == "ready":
                out(model["alias"])
        return
    out(table(_HEAD, [_row(model) for model in models]))
    for model in models:
        for name in ("error", "progress"):
            if model.get(name):
                say(f"{model['alias']}: {model[name]}")
    process = response["process"]
    limit = f" of {format_size(process['memory_limit_bytes'])}" if process.get("memory_limit_bytes") else ""
    say(
        f"process {process['pid']}, version {process['version']}: {format_size(process['resident_bytes'])} in memory, "
        f"models {format_size(process['models_memory_bytes'])}{limit}"
    )


@click.command()
@click.argument("model", type=options.ModelId(), metavar="ID[@REV]")
@click.option("--alias", metavar="NAME", help="Name that requests use. Default: as configured, or ID.")
@options.source
@options.revision
@options.precision
@click.option(
    "--keep", is_flag=True, help="Serve the model again after a restart of the server, until `unload --forget`."
)
@click.option("--no-wait", is_flag=True, help="Do not wait until the model is ready.")
@options.url
@options.progress
@options.json
def load(
    model: str,
    alias: str | None,
    source: Source | None,
    revision: str | None,
    precision: Precision | None,
    url: str | None,
    progress: Mode,
    *,
    keep: bool,
    no_wait: bool,
    as_json: bool,
) -> None:
    """Load a model into the running server.

    The server downloads and compiles the model if necessary. ID is one of the server's models, or a repository id,
    which is then served until `unload --forget` or, without --keep, until the server ends.

    JSON: the model, as in `ps --json`.
    """
    from emb_model_provider.cli.server_client import ServerClient

    settings = options.open_settings()
    name, revision = options.split_single_revision(settings, model, revision)
    client = ServerClient(settings, url)

    def work() -> dict[str, Any]:
        with show_progress(progress) as report, _show_state(client, alias, name, report):
            return client.request(
                "POST",
                "/api/models/load",
                model_name=name,
                alias=alias,
                source=source,
                revision=revision,
                precision=precision,
                keep=keep,
                wait=not no_wait,
            )

    _print(run_until_interrupted(work, _INTERRUPTED), as_json=as_json)


@click.command()
@click.argument("model", type=options.ModelId(), metavar="ID")
@click.option(
    "--forget",
    is_flag=True,
    help="Also stop serving the model, also after a restart. Only for models that are not in the server's settings.",
)
@options.url
@options.json
def unload(model: str, url: str | None, *, forget: bool, as_json: bool) -> None:
    """Unload a model from the running server.

    Its pending requests are answered first. Its files are kept, and the next request for it loads it again.

    JSON: the model, as in `ps --json`.
    """
    from emb_model_provider.cli.server_client import ServerClient

    client = ServerClient(options.open_settings(), url)
    response = run_until_interrupted(
        lambda: client.request("POST", "/api/models/unload", model_name=model, forget=forget), _INTERRUPTED
    )
    _print(response, as_json=as_json)


def _row(model: dict[str, Any]) -> tuple[str, ...]:
    p95 = model.get("p95_s")
    return (
        model["alias"],
        model["state"],
        model.get("precision") or model.get("asked_precision") or "-",
        format_size(model.get("memory_bytes")),
        str(model.get("waiting_inputs", 0)),
        f"{model.get('requests_per_s') or 0:.1f}",
        f"{p95 * 1000:.0f} ms" if p95 is not None else "-",
        str(model.get("requests_served", 0)),
    )


def _print(model: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(model)
        return
    memory = f", {format_size(model['memory_bytes'])}" if model.get("memory_bytes") else ""
    out(f"{model['alias']}: {model['state']}{memory}")


@contextlib.contextmanager
def _show_state(client: ServerClient, alias: str | None, name: str, report: ProgressReporter) -> Iterator[None]:
    """Show the state of a model while the caller waits for the response of the server."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_POLL_S):
            try:
                models = client.models()["models"]
            except ProviderError:
                continue  # the request of the caller fails for the same reason
            # Without an alias, the model has its name as alias. An alias of the settings can have the same model.
            found = [each for each in models if each["alias"] == (alias or name)]
            found += [each for each in models if alias is None and each["model_name"] == name]
            if found and (phase := _PHASES.get(found[0]["state"])) is not None:
                report.model(found[0]["alias"])
                report(Progress(phase, found[0]["model_name"]))

    watcher = threading.Thread(target=watch, name="model-state", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
