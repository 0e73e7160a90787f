"""`emb-provider serve`: the service, as `python -m emb_model_provider.main` starts it."""

from __future__ import annotations

import click

from emb_model_provider.cli.output import out, say


@click.command()
@click.option(
    "--supervise",
    is_flag=True,
    help="Keep the port open in a small process, and start the service again when it crashes or hangs "
    "(as EMB_PROVIDER_SUPERVISE=true).",
)
def serve(*, supervise: bool) -> None:
    """Start the service. What it serves, and where, is set by EMB_PROVIDER_... variables or .env."""
    from emb_model_provider.main import run

    run(supervise=supervise)


_INSTALL = {
    "bash": "emb-provider completion bash > ~/.local/share/bash-completion/completions/emb-provider",
    "zsh": "emb-provider completion zsh > ~/.zfunc/_emb-provider   (with fpath+=~/.zfunc before compinit in ~/.zshrc)",
    "fish": "emb-provider completion fish > ~/.config/fish/completions/emb-provider.fish",
}


@click.command()
@click.argument("shell", type=click.Choice(tuple(_INSTALL)))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a completion script for your shell.

    It completes commands, options and the names of models; how to install it is said on stderr.
    """
    from click.shell_completion import get_completion_class

    completer = get_completion_class(shell)
    if completer is None:
        raise click.UsageError(f"{shell} is not known to this version of click.")
    root = ctx.find_root().command
    out(completer(root, {}, "emb-provider", "_EMB_PROVIDER_COMPLETE").source())
    say(f"To install it, once: {_INSTALL[shell]}")
