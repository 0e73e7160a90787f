"""Which model a name means: an alias or an id from the settings, a repository's id, or a directory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emb_model_provider.settings import MappingEntry

if TYPE_CHECKING:
    from emb_model_provider.model_spec import ModelSpec, Precision, Source
    from emb_model_provider.settings import Settings


def choose(
    settings: Settings,
    model: str,
    *,
    alias: str | None = None,
    source: Source | None = None,
    revision: str | None = None,
    precision: Precision | None = None,
) -> ModelSpec:
    """Return the model that `model` means under these settings; what else is given wins over them.

    A model of the settings is found by its alias or its name, unless `source` or `revision` asks for one from
    elsewhere. Anything else is a directory where there is one of that name, else a repository's id.

    Raises: SettingsError where the precision contradicts the settings.
    """
    own: dict[str, Any] = {"alias": alias, "source": source, "revision": revision, "precision": precision}
    changes = {name: value for name, value in own.items() if value is not None}
    for spec in settings.models().specs:
        if model in (spec.alias, spec.name) and _is_from(spec, source, revision):
            return replace(spec, **changes)
    directory = _directory(model) if source in (None, "auto", "local") else None
    entry = MappingEntry(
        name=directory.resolve().name if directory is not None else model,
        path=directory,
        source=source,
        revision=revision,
        precision=precision,
    )
    return settings.mapped_model(alias or entry.name, entry)


def _is_from(spec: ModelSpec, source: Source | None, revision: str | None) -> bool:
    return source in (None, spec.source) and revision in (None, spec.revision)


def _directory(model: str) -> Path | None:
    try:
        directory = Path(model).expanduser()
        return directory if directory.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # a name that the platform cannot look up is no directory
        return None
