"""The shell: `emb-provider COMMAND`. A command's module is imported when it is called, so that help is quick."""

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

_CLI = "emb_model_provider.cli"
COMMANDS = {
    "serve": f"{_CLI}.serve:serve",
    "pull": f"{_CLI}.pull:pull",
    "list": f"{_CLI}.cached:list_models",
    "show": f"{_CLI}.cached:show",
    "verify": f"{_CLI}.cached:verify",
    "rm": f"{_CLI}.remove:rm",
    "prune": f"{_CLI}.remove:prune",
    "ps": f"{_CLI}.server:ps",
    "load": f"{_CLI}.server:load",
    "unload": f"{_CLI}.server:unload",
    "embed": f"{_CLI}.embed:embed",
    "fidelity": f"{_CLI}.fidelity:fidelity",
    "doctor": f"{_CLI}.doctor:doctor",
    "models": f"{_CLI}.main:models",
    "completion": f"{_CLI}.serve:completion",
}
"""Name of a command to the function that is one."""
OF_MODELS = ("pull", "list", "show", "verify", "rm", "prune", "ps", "load", "unload")
"""Those that `emb-provider models` has, too."""


class _Commands(click.Group):
    def __init__(self, *arguments: Any, names: Iterable[str] = tuple(COMMANDS), **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._names = tuple(names)

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        return list(self._names)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002 - likewise
        if cmd_name not in self._names:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        try:
            return super().make_context(*arguments, **options)
        except KeyboardInterrupt:  # for click it would be a failure like any other
            _end_interrupted()

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ProviderError as error:
            _fail(error.message)
            raise SystemExit(exit_code_of(error)) from error
        except OSError as error:
            if error.errno == errno.EPIPE:  # whoever reads our stdout has enough
                raise
            _fail(f"{error}. To see what is wrong with this machine: emb-provider doctor")
            raise SystemExit(FAILED) from error
        except RuntimeError as error:
            # What pathlib says of a ~ that leads nowhere.
            if "home directory" not in str(error):
                raise
            _fail(f"{str(error).rstrip('.')}. Set HOME to a directory, or write a path in full, without ~.")
            raise SystemExit(FAILED) from error
        except (KeyboardInterrupt, click.Abort):
            _end_interrupted()


def _end_interrupted() -> NoReturn:
    say("interrupted")
    raise SystemExit(INTERRUPTED) from None


def _fail(message: str) -> None:
    say(f"{styled('Error:', fg='red')} {message}")


@click.group(cls=_Commands, names=OF_MODELS)
def models() -> None:
    """The same commands, as `models COMMAND`."""


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("emb-model-provider"), prog_name="emb-provider")
def main() -> None:
    """Embedding models from ModelScope, Hugging Face or a directory, behind the OpenAI API.

    Settings are read from the environment (EMB_PROVIDER_...) and from .env in the working directory. Data goes to
    stdout, all else to stderr. Exit status: 0 done; 1 it failed, or something differs; 2 usage, not found, not allowed;
    3 the server is out of reach; 130 interrupted.
    """
    prepare_streams()
