"""Resolves model names: an alias or an id from the settings, the id of a repository, or a directory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from emb_model_provider.model_spec import BUNDLED_MODEL, BUNDLED_REVISION, name_of_directory
from emb_model_provider.settings import MappingEntry

if TYPE_CHECKING:
    from collections.abc import Iterable

    from emb_model_provider.model_spec import ModelSpec, Precision, Source
    from emb_model_provider.settings import Settings

PATHS = ("/", "./", "../", "~")
"""Prefixes of names that are paths and cannot be repositories."""
MODELSCOPE_OWNERS = ("damo/", "iic/")
"""Owners whose models the source `auto` looks for on ModelScope."""


def resolve_model(
    settings: Settings,
    model: str,
    *,
    alias: str | None = None,
    source: Source | None = None,
    revision: str | None = None,
    precision: Precision | None = None,
) -> ModelSpec:
    """Return the model that a name refers to. The keyword arguments take precedence over the settings.

    The name is one of, in this order:

    1. The alias, the name or the directory of a configured model. A name does not match if another hub or revision is
       requested than the configured one, because the other settings of the model may not apply there. An alias does match
       at another revision; on another hub it replaces the name.
    2. A directory that exists.
    3. The id of a repository.

    Raises:
        SettingsError: The precision contradicts the settings.
    """
    overrides = {"alias": alias, "source": source, "revision": revision, "precision": precision}
    changes: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    directory = directory_of(model) if source in (None, "auto", "local") else None
    configured = settings.models.specs()
    named = [spec for spec in configured if model in (spec.alias, spec.name)]
    if not named and directory is not None:
        named = [spec for spec in configured if spec.path is not None and spec.path.resolve() == directory.resolve()]
    at_hub = [spec for spec in named if source in (None, spec.source, resolve_source(spec))]
    for spec in at_hub:
        if revision in (None, spec.revision):
            return replace(spec, **changes)
    for spec in at_hub:
        if model == spec.alias != spec.name and spec.path is None:
            return replace(spec, **changes)
    if named and model == named[0].alias and "/" not in model:
        # The alias stands for the name, because an alias without an owner is not a repository of the other hub.
        model = named[0].name
    entry = MappingEntry(
        name=name_of_directory(directory) if directory is not None else model,
        path=directory,
        source=source,
        revision=revision,
        precision=precision,
    )
    return settings.models.spec_for(alias or entry.name, entry)


def resolve_source(spec: ModelSpec) -> Literal["huggingface", "modelscope", "local", "bundled"]:
    """Return the hub of a model, without requests. Checks whether directories exist."""
    if spec.path is not None:
        return "local"
    if spec.source != "auto":
        return spec.source
    if spec.name.startswith(PATHS) or directory_of(spec.name) is not None:
        return "local"
    if spec.name == BUNDLED_MODEL and spec.endpoint is None and spec.revision in {None, BUNDLED_REVISION}:
        return "bundled"
    if spec.name.startswith(MODELSCOPE_OWNERS):
        return "modelscope"
    return "huggingface"


def directory_of(model: str) -> Path | None:
    """Return the directory that a name refers to, or None if it does not exist."""
    try:
        directory = Path(model).expanduser()
        return directory if directory.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # the platform cannot look up this name
        return None


def hidden_repository_note(spec: ModelSpec) -> str:
    """Return a sentence, after a space, for errors of a model in a directory whose name could be that of a repository.

    It says how to get the model of a hub. Empty if the model is not such a directory.
    """
    name = str(spec.path or spec.name)
    if name.startswith(PATHS) or len(Path(name).parts) != 2 or directory_of(name) is None:
        return ""
    return (
        f" {name} is a directory here ({Path(name).absolute()}), and directories take precedence over the hubs. To use the "
        "model of a hub, set EMB_PROVIDER_MODEL_SOURCE to huggingface or modelscope."
    )


def build_alias_index(configured: Iterable[ModelSpec], added: Iterable[ModelSpec] = ()) -> dict[str, str]:
    """Return the alias that each name refers to: ids, and last parts of ids and aliases that are unique.

    An id of several configured models refers to the first one. Models that were added later change the meaning of no
    earlier name, because a client that uses it would get an error or the vectors of another model.
    """
    names = _names_of(configured)
    for spec in added:
        names = _names_of([spec]) | names
    return {name: alias for name, alias in names.items() if alias is not None}


def _names_of(specs: Iterable[ModelSpec]) -> dict[str, str | None]:
    """Return the alias of each name, or None if the name is ambiguous among these models."""
    ids: dict[str, str] = {}
    last_parts: dict[str, set[str]] = {}
    for spec in specs:
        ids.setdefault(spec.name, spec.alias)
        for name in (spec.name, spec.alias):
            last_parts.setdefault(name.rstrip("/").rpartition("/")[2], set()).add(spec.alias)
    unique = {name: next(iter(aliases)) if len(aliases) == 1 else None for name, aliases in last_parts.items()}
    return {**unique, **ids}
