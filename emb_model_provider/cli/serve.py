"""`emb-provider serve` starts the service; `emb-provider completion` prints completion scripts."""

from __future__ import annotations

import os
from pathlib import Path

import click

from emb_model_provider.cli.output import out, say
from emb_model_provider.model_spec import name_of_directory

_INSTALL_COMMANDS = {
    "bash": "emb-provider completion bash > ~/.local/share/bash-completion/completions/emb-provider",
    "zsh": "emb-provider completion zsh > ~/.zfunc/_emb-provider   (with fpath+=~/.zfunc before compinit in ~/.zshrc)",
    "fish": "emb-provider completion fish > ~/.config/fish/completions/emb-provider.fish",
}


@click.command()
@click.argument(
    "directory", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path), metavar="[DIR]"
)
@click.option(
    "--supervise",
    is_flag=True,
    help="Run the service as a child of a small process that keeps the port open, and restarts the service if it "
    "crashes or hangs (like EMB_PROVIDER_SUPERVISE=true).",
)
def serve(directory: Path | None, *, supervise: bool) -> None:
    """Start the service. It is configured with EMB_PROVIDER_... variables or .env.

    DIR is served in place of the model that EMB_PROVIDER_MODEL_NAME or EMB_PROVIDER_MODEL_PATH names: a directory that
    `mirror` wrote, or any other directory with a model.
    """
    from emb_model_provider.main import run

    if directory is not None:
        # Variables take precedence over .env, and a supervised service inherits them.
        os.environ["EMB_PROVIDER_MODEL_PATH"] = str(directory.absolute())
        os.environ["EMB_PROVIDER_MODEL_NAME"] = name_of_directory(directory)
    run(supervise=supervise)


@click.command()
@click.argument("shell", type=click.Choice(tuple(_INSTALL_COMMANDS)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a completion script for a shell.

    The script completes commands, options and names of models. How to install it is printed on stderr.
    """
    from click.shell_completion import get_completion_class

    completer = get_completion_class(shell)
    if completer is None:
        raise click.UsageError(f"The installed version of click does not support {shell}.")
    root = ctx.find_root().command
    out(completer(root, {}, "emb-provider", "_EMB_PROVIDER_COMPLETE").source())
    say(f"To install it, run once: {_INSTALL_COMMANDS[shell]}")
