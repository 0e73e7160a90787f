"""Which model a name means: an alias or an id from the settings, a repository's id, or a directory; and whose it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from emb_model_provider.model_spec import BUNDLED_MODEL, BUNDLED_REVISION
from emb_model_provider.settings import MappingEntry

if TYPE_CHECKING:
    from collections.abc import Iterable

    from emb_model_provider.model_spec import ModelSpec, Precision, Source
    from emb_model_provider.settings import Settings


PATHS = ("/", "./", "../", "~")
"""How a name begins that cannot be a repository's."""
MODELSCOPE_OWNERS = ("damo/", "iic/")
"""Owners whose models are on ModelScope, for `auto`."""


def resolve_model(
    settings: Settings,
    model: str,
    *,
    alias: str | None = None,
    source: Source | None = None,
    revision: str | None = None,
    precision: Precision | None = None,
) -> ModelSpec:
    """Return the model that `model` means under these settings; what else is given wins over them.

    A model of the settings is found by its alias or its name. By its alias it is found at another hub or revision,
    too, by its name only where the settings mean those: what they say of it may not hold there. Anything else is a
    directory where there is one of that name, else a repository's id.

    Raises: SettingsError where the precision contradicts the settings.
    """
    own: dict[str, Any] = {"alias": alias, "source": source, "revision": revision, "precision": precision}
    changes = {name: value for name, value in own.items() if value is not None}
    named = [spec for spec in settings.models.specs() if model in (spec.alias, spec.name)]
    at_hub = [spec for spec in named if source in (None, spec.source, resolve_source(spec))]
    for spec in at_hub:
        if revision in (None, spec.revision):
            return replace(spec, **changes)
    for spec in at_hub:
        if model == spec.alias != spec.name and spec.path is None:
            return replace(spec, **changes)
    if named and model == named[0].alias and "/" not in model:
        model = named[0].name  # at another hub: there an alias without an owner is no repository
    directory = directory_of(model) if source in (None, "auto", "local") else None
    entry = MappingEntry(
        name=directory.resolve().name if directory is not None else model,
        path=directory,
        source=source,
        revision=revision,
        precision=precision,
    )
    return settings.models.spec_for(alias or entry.name, entry)


def resolve_source(spec: ModelSpec) -> Literal["huggingface", "modelscope", "local", "bundled"]:
    """The hub that a model comes from. Looks at the disk, for directories, and asks nobody."""
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
    """Return the directory that a name means, or None where there is none of that name."""
    try:
        directory = Path(model).expanduser()
        return directory if directory.is_dir() else None
    except (OSError, RuntimeError, ValueError):  # a name that the platform cannot look up is no directory
        return None


def build_alias_index(configured: Iterable[ModelSpec], added: Iterable[ModelSpec] = ()) -> dict[str, str]:
    """Map ids of models to the first alias that serves them, and last parts that mean just one model to its alias.

    A model that is added takes no name from those before it, nor makes one of theirs unclear: whoever uses it would get
    an error, or another model's vectors, from one request to the next.
    """
    names = _names_of(configured)
    for spec in added:
        names = _names_of([spec]) | names
    return {name: alias for name, alias in names.items() if alias is not None}


def _names_of(specs: Iterable[ModelSpec]) -> dict[str, str | None]:
    """The same for models none of which comes before another; None for what is unclear among them."""
    ids: dict[str, str] = {}
    last_parts: dict[str, set[str]] = {}
    for spec in specs:
        ids.setdefault(spec.name, spec.alias)
        for name in (spec.name, spec.alias):
            last_parts.setdefault(name.rstrip("/").rpartition("/")[2], set()).add(spec.alias)
    unique = {
        name: next(iter(aliases)) if len(aliases) == 1 else None for name, aliases in last_parts.items()
    }
    return {**unique, **ids}
