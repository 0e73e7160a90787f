"""`emb-provider serve` starts the service; `emb-provider completion` prints completion scripts."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from emb_model_provider.cli import options
from emb_model_provider.cli.output import out, say
from emb_model_provider.error_table import FAILED
from emb_model_provider.errors import SettingsError
from emb_model_provider.model_spec import BackendName

if TYPE_CHECKING:
    from emb_model_provider.model_spec import ModelSpec, Precision, Source
    from emb_model_provider.settings import MappingEntry


def _check_device(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Reject other values here, because the error of the settings would name the variable."""
    if value is not None and not re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", value.strip().lower()):
        raise click.BadParameter(f"{value!r} is not one of auto, cpu, cuda, cuda:N, mps.")
    return value


@click.command()
@click.argument("models", nargs=-1, type=options.ModelId(), metavar="[MODEL[@REV]]...")
@options.source
@options.revision
@options.precision
@click.option(
    "--device", metavar="DEVICE", callback=_check_device, help="Device of the models: auto, cpu, cuda, cuda:N or mps."
)
@click.option("--backend", type=click.Choice(get_args(BackendName)), help="Runtime of the models. Default: auto.")
@click.option(
    "--host", metavar="ADDRESS", help="Address to listen on. Default: localhost, so that only this machine is answered."
)
@click.option("--port", type=click.IntRange(1, 65_535), help="Port to listen on. Default: 9000.")
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    metavar="KEY",
    help="Key that requests must have. Can be repeated. Other users of this machine can see it in the list of processes: "
    "EMB_PROVIDER_API_KEYS avoids that.",
)
@click.option(
    "--supervise",
    is_flag=True,
    help="Run the service as a child of a small process that keeps the port open, and restarts the service if it "
    "crashes or hangs (like EMB_PROVIDER_SUPERVISE=true).",
)
def serve(
    models: tuple[str, ...],
    source: Source | None,
    revision: str | None,
    precision: Precision | None,
    device: str | None,
    backend: BackendName | None,
    host: str | None,
    port: int | None,
    api_keys: tuple[str, ...],
    *,
    supervise: bool,
) -> None:
    """Start the service. Options take precedence over EMB_PROVIDER_... variables and .env.

    MODEL is an alias of the settings, a repository id, or a directory, such as one that `mirror` wrote. All of them are
    loaded at the start, and the first is the default model. They take the place of EMB_PROVIDER_MODEL_NAME; other models
    of EMB_PROVIDER_MODEL_MAPPING are loaded at their first request. Without MODEL, the models of the settings are served.

    --source, --revision and --precision apply to each MODEL, --device and --backend to all models.
    """
    from emb_model_provider.main import run

    if not models and (source, revision, precision) != (None, None, None):
        raise click.UsageError("--source, --revision and --precision require a MODEL.")
    if revision is not None and len(models) != 1:
        raise click.UsageError("--revision requires exactly one MODEL. For several, write MODEL@REV.")
    if any("," in key or not key.strip() for key in api_keys):
        raise click.UsageError(
            "--api-key: a key must not be empty or contain a comma. Repeat the option for several keys."
        )
    values = {"DEVICE": device, "BACKEND": backend, "HOST": host, "PORT": port, "API_KEYS": ",".join(api_keys) or None}
    # As variables, because they take precedence over .env, and a supervised service inherits them.
    _set_variables({name: str(value) for name, value in values.items() if value is not None})
    if models:
        try:
            _set_variables(_model_variables(models, source, revision, precision))
        except SettingsError as error:  # with the exit code of a service that cannot start
            say(f"Error: {error}")
            raise SystemExit(FAILED) from None
    run(supervise=supervise)


def _set_variables(values: dict[str, str]) -> None:
    from emb_model_provider.settings import PREFIX

    os.environ.update({PREFIX + name: value for name, value in values.items()})


def _model_variables(
    models: tuple[str, ...], source: Source | None, revision: str | None, precision: Precision | None
) -> dict[str, str]:
    """Return the settings that serve these models. An empty value hides that of `.env`."""
    from emb_model_provider.model_resolver import PATHS, directory_of, resolve_model
    from emb_model_provider.settings.loading import load_settings

    settings, _ = load_settings()  # its warnings are those of the service
    others = dict(settings.models.model_mapping)
    served: dict[str, dict[str, Any]] = {}
    for argument in models:
        name, wanted = options.split_single_revision(settings, argument, revision)
        if name.startswith(PATHS) and directory_of(name) is None:
            raise click.UsageError(f"The directory {name} does not exist.")
        spec = resolve_model(settings, name, source=source, revision=wanted, precision=precision)
        changes = {"source": source, "revision": wanted, "precision": precision}
        changed = {key: value for key, value in changes.items() if value is not None}
        configured = {alias: _as_json(others.pop(alias)) | changed for alias in spec.aliases if alias in others}
        served |= configured or {spec.alias: _entry_of(spec)}
    mapping = {**served, **{alias: _as_json(entry) for alias, entry in others.items()}}
    preload = [*served][: settings.memory.max_loaded_models]
    return {
        **dict.fromkeys(("MODEL_NAME", "MODEL_PATH", "MODEL_REVISION"), ""),
        "MODEL_MAPPING": json.dumps(mapping),
        "PRELOAD_MODELS": ",".join(preload) if others else "",
    }


def _entry_of(spec: ModelSpec) -> dict[str, Any]:
    """Return the entry of MODEL_MAPPING for a model without one."""
    entry = {
        "name": spec.name,
        "source": spec.source,
        "path": str(spec.path.absolute()) if spec.path is not None else None,
        "revision": spec.revision,
        "precision": spec.precision,
    }
    return {key: value for key, value in entry.items() if value is not None}


def _as_json(entry: MappingEntry) -> dict[str, Any]:
    token = {"token": entry.token.get_secret_value()} if entry.token is not None else {}
    return entry.model_dump(mode="json", exclude_unset=True) | token


@click.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
@click.option("--install", is_flag=True, help="Write the script to where the shell looks for it.")
@click.pass_context
def completion(ctx: click.Context, shell: str, *, install: bool) -> None:
    """Print a completion script for a shell, or install it.

    The script completes commands, options and names of models.
    """
    from click.shell_completion import get_completion_class

    completer = get_completion_class(shell)
    if completer is None:
        raise click.UsageError(f"The installed version of click does not support {shell}.")
    script = completer(ctx.find_root().command, {}, "emb-provider", "_EMB_PROVIDER_COMPLETE").source()
    path = _completion_file(shell)
    if install:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(script, encoding="utf-8")
        say(f"Written to {path}. New shells complete emb-provider.")
    else:
        out(script)
        say(f"To install it: emb-provider completion {shell} --install")
    if shell == "zsh":
        say(f"~/.zshrc needs this line, unless it has one: fpath+=({path.parent}); autoload -Uz compinit; compinit")


def _completion_file(shell: str) -> Path:
    """Return where a shell looks for the completion script of a command."""

    def directory(variable: str, default: str) -> Path:
        return Path(os.environ.get(variable) or default).expanduser()

    match shell:
        case "bash":
            data = directory("XDG_DATA_HOME", "~/.local/share") / "bash-completion"
            return directory("BASH_COMPLETION_USER_DIR", str(data)) / "completions" / "emb-provider"
        case "zsh":
            return directory("ZDOTDIR", "~") / ".zfunc" / "_emb-provider"
        case _:
            return directory("XDG_CONFIG_HOME", "~/.config") / "fish" / "completions" / "emb-provider.fish"
