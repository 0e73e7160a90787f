"""The command line: `emb-provider COMMAND`. The module of a command is imported when it is needed."""

from __future__ import annotations

import difflib
import errno
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NoReturn

import click

from emb_model_provider.cli.output import error_as_json, exit_code_of, prepare_streams, print_json, say, styled
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
    "rerank": "rerank:rerank",
    "batches": "batches:batches",
    "fidelity": "fidelity:fidelity",
    "tune": "tune:tune",
    "transfer": "transfer:transfer",
    "doctor": "doctor:doctor",
    "models": "main:models",
    "completion": "serve:completion",
}
"""Names of the commands, and where their functions are in this package."""
_AS_JSON = f"{__name__}.as_json"
"""Where a context keeps whether the command line contains --json."""
MODEL_COMMANDS = ("pull", "mirror", "list", "show", "verify", "rm", "prune", "ps", "load", "unload")
"""Commands that are also available as `emb-provider models COMMAND`."""


_SYNONYMS = {
    **dict.fromkeys(("run", "start", "up", "server"), "serve"),
    **dict.fromkeys(("download", "fetch", "get", "add", "install"), "pull"),
    **dict.fromkeys(("ls", "cached", "cache"), "list"),
    **dict.fromkeys(("info", "inspect", "describe"), "show"),
    **dict.fromkeys(("remove", "delete", "del", "uninstall"), "rm"),
    **dict.fromkeys(("clean", "gc"), "prune"),
    **dict.fromkeys(("status", "top"), "ps"),
    **dict.fromkeys(("stop", "evict"), "unload"),
    **dict.fromkeys(("encode", "vectors"), "embed"),
    **dict.fromkeys(("batch", "jobs"), "batches"),
    **dict.fromkeys(("export", "save"), "mirror"),
    **dict.fromkeys(("copy", "cp", "push", "upload", "migrate"), "transfer"),
    **dict.fromkeys(("check", "diagnose"), "doctor"),
    "help": "--help",
}
"""Names of commands in similar tools, such as Ollama, Docker and the clients of the hubs."""


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

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self._names and not name.startswith("-"):
            similar = difflib.get_close_matches(name, self._names, n=1)
            meant = _SYNONYMS.get(name, similar[0] if similar else None)
            if meant in (*self._names, "--help"):
                raise click.UsageError(f"No such command {name!r}. Did you mean {meant!r}?", ctx)
        return super().resolve_command(ctx, args)

    def make_context(self, info_name: str | None, args: list[str], *arguments: Any, **options: Any) -> click.Context:
        # Read here, because a command whose arguments are wrong does not get them.
        as_json = "--json" in (args[: args.index("--")] if "--" in args else args)
        try:
            ctx = super().make_context(info_name, args, *arguments, **options)
        except KeyboardInterrupt:  # click would exit with 1
            _end_interrupted()
        ctx.meta.setdefault(_AS_JSON, as_json)
        return ctx

    def invoke(self, ctx: click.Context) -> object:
        as_json = bool(ctx.meta[_AS_JSON])
        try:
            return super().invoke(ctx)
        except ProviderError as error:
            if as_json:
                print_json({"error": error_as_json(error)})
            _fail(error.message, exit_code_of(error))
        except click.ClickException as error:
            if as_json:
                print_json({"error": {"code": "invalid_usage", "message": error.format_message()}})
            raise
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader of stdout has ended, which click handles
                raise
            _fail(f"{error}. To check this machine: emb-provider doctor", as_json=as_json)
        except RuntimeError as error:
            if "home directory" not in str(error):  # raised by pathlib for a ~ that it cannot expand
                raise
            hint = "Set HOME to a directory, or write the path without ~."
            _fail(f"{str(error).rstrip('.')}. {hint}", as_json=as_json)
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
    stdout, everything else on stderr; with --json, an error is also an object {"error": {code, message}} on stdout. Exit codes: 0 success; 1 the work failed, or something differs; 2 invalid usage,
    not found, or not allowed; 3 the server cannot be reached; 130 interrupted.
    """
    prepare_streams()


def _end_interrupted() -> NoReturn:
    say("interrupted")
    raise SystemExit(INTERRUPTED) from None


def _fail(message: str, exit_code: int = FAILED, *, as_json: bool = False) -> NoReturn:
    if as_json:
        print_json({"error": {"code": "failed", "message": message}})
    for line in message.splitlines():
        say(f"{styled('Error:', fg='red')} {line}")
    raise SystemExit(exit_code)
