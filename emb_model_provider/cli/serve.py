"""`emb-provider serve` starts the service; `emb-provider completion` prints completion scripts."""

from __future__ import annotations

import click

from emb_model_provider.cli.output import out, say

_INSTALL_COMMANDS = {
    "bash": "emb-provider completion bash > ~/.local/share/bash-completion/completions/emb-provider",
    "zsh": "emb-provider completion zsh > ~/.zfunc/_emb-provider   (with fpath+=~/.zfunc before compinit in ~/.zshrc)",
    "fish": "emb-provider completion fish > ~/.config/fish/completions/emb-provider.fish",
}


@click.command()
@click.option(
    "--supervise",
    is_flag=True,
    help="Run the service as a child of a small process that keeps the port open, and restarts the service if it "
    "crashes or hangs (like EMB_PROVIDER_SUPERVISE=true).",
)
def serve(*, supervise: bool) -> None:
    """Start the service. It is configured with EMB_PROVIDER_... variables or .env."""
    from emb_model_provider.main import run

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
