"""Renders the templates of the console."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emb_model_provider.api.console.charts import shade
from emb_model_provider.api.console.snippets import cli_command
from emb_model_provider.api.console.texts import LANGUAGES, Language, number, size, texts_in
from emb_model_provider.api.paths import CONSOLE
from emb_model_provider.formatting import format_cosine

if TYPE_CHECKING:
    from jinja2 import Environment

_DIRECTORY = Path(__file__).parent
STATIC = _DIRECTORY / "static"
_TEMPLATES = _DIRECTORY / "templates"


def render(template: str, language: Language, **values: Any) -> str:
    return _environment().get_template(template).render(t=texts_in(language), **values)


@cache
def asset_url(name: str) -> str:
    """Return the URL of an asset, which changes with its content, so that browsers can keep it."""
    digest = hashlib.sha256((STATIC / name).read_bytes()).hexdigest()[:12]
    return f"{CONSOLE}/static/{name}?v={digest}"


@cache
def _environment() -> Environment:
    # Imported for the first page, because the service starts sooner without it.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"size": size, "number": number, "cosine": format_cosine, "shade": shade}
    environment.globals |= {
        "asset": asset_url,
        "cli": cli_command,
        "languages": LANGUAGES,
        "version": version("emb-model-provider"),
    }
    return environment
