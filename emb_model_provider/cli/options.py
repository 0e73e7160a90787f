"""Options that several commands share, and the settings that every command reads."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import click

from emb_model_provider.cli.output import warn
from emb_model_provider.model_spec import Precision, Source

if TYPE_CHECKING:
    from collections.abc import Callable

    from click.shell_completion import CompletionItem

    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.settings import Settings

F = TypeVar("F", bound="Callable[..., Any]")


class ModelId(click.ParamType[str]):
    """The name of a model. Shells complete it from the models that are configured or on disk."""

    name = "ID"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not str(value).strip():
            self.fail("the name of a model must not be empty", param, ctx)
        return str(value)

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's signature
        param: click.Parameter,  # noqa: ARG002 - likewise
        incomplete: str,
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(name) for name in _known_names() if name.startswith(incomplete)]


json = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout instead of text.")
yes = click.option("-y", "--yes", is_flag=True, help="Do not ask for confirmation.")
dry_run = click.option("--dry-run", is_flag=True, help="Show what would be removed, and remove nothing.")
source = click.option(
    "--source", type=click.Choice(get_args(Source)), help="Hub that the model comes from. Default: as configured."
)
revision = click.option("--revision", metavar="REV", help="Branch, tag or commit.")
precision = click.option(
    "--precision", type=click.Choice(get_args(Precision)), help="Precision of the model. Default: as configured."
)
progress = click.option(
    "--progress",
    type=click.Choice(["auto", "plain", "json", "none"]),
    default="auto",
    show_default=True,
    help="How to show progress on stderr. plain: a line every 10 % or 10 s. json: one object per line. "
    "auto: one line that is redrawn on a terminal, else plain.",
)
url = click.option(
    "--url",
    metavar="URL",
    help="URL of the server. Default: http:// with EMB_PROVIDER_HOST and EMB_PROVIDER_PORT of the settings.",
)


def quiet(content: str) -> Callable[[F], F]:
    return click.option("-q", "--quiet", is_flag=True, help=f"Print only {content}.")


def open_settings() -> Settings:
    """Read the settings, and print warnings about them on stderr."""
    from emb_model_provider.settings.loading import load_settings

    settings, warnings = load_settings()
    for warning in warnings:
        warn(warning)
    return settings


def open_manager() -> tuple[Settings, ModelManager]:
    """Read the settings, and return them with a manager of the models on disk."""
    from emb_model_provider.management.manager import ModelManager

    settings = open_settings()
    return settings, ModelManager(settings)


def split_revision(settings: Settings, argument: str, default: str | None = None) -> tuple[str, str | None]:
    """Split `ID@REV` into the name and the revision, which is the default for an ID without one.

    A name that contains an @ is not split if it is a configured model or a directory.
    """
    from emb_model_provider.model_resolver import directory_of
    from emb_model_provider.model_spec import parse_address

    with contextlib.suppress(ValueError):
        if parse_address(argument) is not None:  # the resolver reads the revision in a URL
            return argument, default
    name, _, own = argument.rpartition("@")
    configured = {name for spec in settings.models.specs() for name in (*spec.aliases, spec.name)}
    if not name or not own or argument in configured or directory_of(argument) is not None:
        return argument, default
    return name, own


def split_single_revision(settings: Settings, argument: str, default: str | None) -> tuple[str, str | None]:
    """Split the only ID of a command like `split_revision`; it is an error if both name a revision."""
    name, own = split_revision(settings, argument)
    if own is not None and default is not None:
        raise click.UsageError(f"{argument} and --revision {default} both name a revision: remove one.")
    return name, own or default


def _known_names() -> list[str]:
    try:
        from emb_model_provider.management.manager import ModelManager
        from emb_model_provider.settings.loading import load_settings

        settings, _ = load_settings()
        configured = {alias for spec in settings.models.specs() for alias in spec.aliases}
        return sorted(configured | {model.model_name for model in ModelManager(settings).list()})
    except Exception:  # noqa: BLE001 - an error would be printed into the command that the user types
        return []
