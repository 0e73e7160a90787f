"""The command line: `emb-provider COMMAND`. The module of a command is imported when it is needed."""

from __future__ import annotations

import errno
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NoReturn

import click

from emb_model_provider.cli.output import exit_code_of, prepare_streams, say, styled
from emb_model_provider.error_table import FAILED, INTERRUPTED
from emb_model_provider.errors import ProviderError

if TYPE_CHECKING:
    from collections.abc import Iterable

COMMANDS = {
    "serve": "serve:serve",
    "pull": "pull:pull",
    "mirror": "mirror:mirror",
    "list": "cached:list_models",
    "show": "cached:show",
    "verify": "cached:verify",
    "rm": "remove:rm",
    "prune": "remove:prune",
    "ps": "server:ps",
    "load": "server:load",
    "unload": "server:unload",
    "embed": "embed:embed",
    "fidelity": "fidelity:fidelity",
    "transfer": "transfer:transfer",
    "doctor": "doctor:doctor",
    "models": "main:models",
    "completion": "serve:completion",
}
"""Names of the commands, and where their functions are in this package."""
MODEL_COMMANDS = ("pull", "mirror", "list", "show", "verify", "rm", "prune", "ps", "load", "unload")
"""Commands that are also available as `emb-provider models COMMAND`."""


class CommandGroup(click.Group):
    """A group whose commands are imported when they are needed, and whose errors end with the documented exit code."""

    def __init__(self, *arguments: Any, names: Iterable[str] = tuple(COMMANDS), **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._names = tuple(names)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self._names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - likewise
        if cmd_name not in self._names:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(f"emb_model_provider.cli.{module}"), name)
        return command

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        try:
            return super().make_context(*arguments, **options)
        except KeyboardInterrupt:  # click would exit with 1
            _end_interrupted()

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ProviderError as error:
            _fail(error.message, exit_code_of(error))
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of stdout has ended, which click handles
                raise
            _fail(f"{error}. To check this machine: emb-provider doctor")
        except RuntimeError as error:
            if "home directory" not in str(error):  # raised by pathlib for a ~ that it cannot expand
                raise
            _fail(f"{str(error).rstrip('.')}. Set HOME to a directory, or write the path without ~.")
        except (KeyboardInterrupt, click.Abort):
            _end_interrupted()


@click.group(cls=CommandGroup, names=MODEL_COMMANDS)
def models() -> None:
    """Run a model command, as `models COMMAND`."""


@click.command(cls=CommandGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("emb-model-provider"), prog_name="emb-provider")
def main() -> None:
    """Serve embedding models from ModelScope, Hugging Face or a directory through the OpenAI API.

    Settings are read from the environment (EMB_PROVIDER_...) and from .env in the working directory. Data is printed on
    stdout, everything else on stderr. Exit codes: 0 success; 1 the work failed, or something differs; 2 invalid usage,
    not found, or not allowed; 3 the server cannot be reached; 130 interrupted.
    """
    prepare_streams()


def _end_interrupted() -> NoReturn:
    say("interrupted")
    raise SystemExit(INTERRUPTED) from None


def _fail(message: str, exit_code: int = FAILED) -> NoReturn:
    say(f"{styled('Error:', fg='red')} {message}")
    raise SystemExit(exit_code)
