"""The shell: `emb-provider COMMAND`. A command's module is imported when it is called, so that help is quick."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version

import click

from emb_model_provider.errors import (
    AccessDeniedError,
    ProviderError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SettingsError,
)

COMMANDS = {
    "fidelity": "emb_model_provider.cli.fidelity:fidelity",
    "serve": "emb_model_provider.cli.serve:serve",
}
"""Name of a command to the function that is one."""
_FAILED, _NOT_SO, _INTERRUPTED = 1, 2, 130
"""Exit codes beside 0: the work failed; it cannot be asked like this (usage, not found, not allowed); Ctrl-C."""
_ASKED_WRONGLY = (SettingsError, RepositoryNotFoundError, RevisionNotFoundError, AccessDeniedError)


class _Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - likewise
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ProviderError as error:
            click.echo(f"Error: {error.message}", err=True)
            raise SystemExit(_NOT_SO if isinstance(error, _ASKED_WRONGLY) else _FAILED) from error
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            raise SystemExit(_INTERRUPTED) from None


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("emb-model-provider"), prog_name="emb-provider")
def main() -> None:
    """Embedding models from ModelScope, Hugging Face or a directory, behind the OpenAI API.

    Settings are read from the environment (EMB_PROVIDER_...) and from .env in the working directory.
    """
