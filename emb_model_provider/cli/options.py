"""Options that several commands have, and how model ids are completed."""

from __future__ import annotations

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

PROGRESS = ("auto", "plain", "json", "none")


class ModelId(click.ParamType[str]):
    """A model's name; completed from those that are configured or on disk."""

    name = "ID"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if not str(value).strip():
            self.fail("a model's name is empty", param, ctx)
        return str(value)

    def shell_complete(
        self,
        ctx: click.Context,  # noqa: ARG002 - click's signature
        param: click.Parameter,  # noqa: ARG002 - likewise
        incomplete: str,
    ) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(name) for name in _known_names() if name.startswith(incomplete)]


def _known_names() -> list[str]:
    """Return what a name could be completed to; nothing where that cannot be found out: no shell wants an error."""
    try:
        from emb_model_provider.management.manager import ModelManager
        from emb_model_provider.settings.loading import load_settings

        settings, _ = load_settings()
        configured = {spec.alias for spec in settings.models.specs()}
        return sorted(configured | {model.model_name for model in ModelManager(settings).list()})
    except Exception:  # noqa: BLE001 - whatever it is, the user is in the middle of typing
        return []


def json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="JSON on stdout instead of text.")(function)


def quiet_option(what: str) -> Callable[[F], F]:
    return click.option("-q", "--quiet", is_flag=True, help=f"Print {what} only.")


def yes_option(function: F) -> F:
    return click.option("-y", "--yes", is_flag=True, help="Do not ask.")(function)


def dry_run_option(function: F) -> F:
    return click.option("--dry-run", is_flag=True, help="Say what would be removed, and remove nothing.")(
        function
    )


def source_option(function: F) -> F:
    return click.option(
        "--source", type=click.Choice(get_args(Source)), help="Which hub it is from. Default: as configured."
    )(function)


def revision_option(function: F) -> F:
    return click.option("--revision", metavar="REV", help="Branch, tag or commit.")(function)


def precision_option(function: F) -> F:
    return click.option(
        "--precision", type=click.Choice(get_args(Precision)), help="How it computes. Default: as configured."
    )(function)


def progress_option(function: F) -> F:
    return click.option(
        "--progress",
        type=click.Choice(PROGRESS),
        default="auto",
        show_default=True,
        help="On stderr. auto: one line that is redrawn on a terminal, else plain: a line every 10 % or 10 s. "
        "json: one object a line.",
    )(function)


def url_option(function: F) -> F:
    return click.option(
        "--url",
        metavar="URL",
        help="The server. Default: http:// and EMB_PROVIDER_HOST and EMB_PROVIDER_PORT of your settings.",
    )(function)


def open_settings() -> Settings:
    """Read the settings; what is odd about them is said on stderr.

    Raises: SettingsError.
    """
    from emb_model_provider.settings.loading import load_settings

    settings, warnings = load_settings()
    for warning in warnings:
        warn(warning)
    return settings


def open_manager() -> tuple[Settings, ModelManager]:
    """Raises: SettingsError."""
    from emb_model_provider.management.manager import ModelManager

    settings = open_settings()
    return settings, ModelManager(settings)


def split_revision(settings: Settings, typed: str) -> tuple[str, str | None]:
    """Take `ID@REV` apart; the name of a configured model or of a directory may have an @ of its own."""
    from emb_model_provider.model_resolver import directory_of

    name, at, revision = typed.rpartition("@")
    known = {name for spec in settings.models.specs() for name in (spec.alias, spec.name)}
    if not at or not name or not revision or typed in known or directory_of(typed) is not None:
        return typed, None
    return name, revision
