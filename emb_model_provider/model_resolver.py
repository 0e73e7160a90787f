"""Resolves model names: an alias or an id from the settings, the id of a repository, or a directory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from emb_model_provider.errors import SettingsError
from emb_model_provider.model_spec import (
    BUNDLED_MODEL,
    BUNDLED_REVISION,
    RequestDefaults,
    name_of_directory,
    parse_address,
)
from emb_model_provider.settings import MappingEntry

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from emb_model_provider.model_spec import ModelSpec, Precision, Source
    from emb_model_provider.settings import Settings

PATHS = ("/", "./", "../", "~")
"""Prefixes of names that are paths and cannot be repositories."""
MODELSCOPE_OWNERS = ("damo/", "iic/")
"""Owners whose models the source `auto` looks for on ModelScope."""

_TAG = ":latest"
_OPENAI = "openai/"
_SIDES = {"query": "query", "passage": "document"}
"""Endings of the names NAME-query and NAME-passage, which NVIDIA NIM introduced, and their `input_type`."""


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

    1. The alias, the name or the directory of a configured model, or the last part of the name of one. A name does not
       match if another hub or revision is requested than the configured one, because the other settings of the model may
       not apply there. An alias does match at another revision; on another hub it replaces the name.
    2. A directory that exists.
    3. The id of a repository, or the URL of its page on a hub.

    Raises:
        SettingsError: The precision contradicts the settings, or a URL contradicts the source or the revision.
    """
    model, source, revision = read_address(model, source, revision)
    overrides = {"alias": alias, "source": source, "revision": revision, "precision": precision}
    changes: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    directory = directory_of(model) if source in (None, "auto", "local") else None
    configured = settings.models.specs()
    named = [spec for spec in configured if model in (*spec.aliases, spec.name)]
    if not named and directory is not None:
        named = [spec for spec in configured if spec.path is not None and spec.path.resolve() == directory.resolve()]
    if not named and directory is None and "/" not in model:
        last = [spec for spec in configured if spec.name.rpartition("/")[2] == model and spec.path is None]
        named = last if len(last) == 1 else []
    at_hub = [spec for spec in named if source in (None, spec.source, resolve_source(spec))]
    for spec in at_hub:
        if revision in (None, spec.revision):
            return _change(spec, changes)
    for spec in at_hub:
        if model in spec.aliases and model != spec.name and spec.path is None:
            return _change(spec, changes)
    if named and model in named[0].aliases and "/" not in model:
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


def read_address(model: str, source: Source | None, revision: str | None) -> tuple[str, Source | None, str | None]:
    """Return the id of a repository with its hub and revision, if a name is a URL of a hub; else return all as they are.

    Raises:
        SettingsError: The URL is not that of a model, or contradicts the source or the revision.
    """
    try:
        address = parse_address(model)
    except ValueError as error:
        raise SettingsError(f"{error}.") from None
    if address is None:
        return model, source, revision
    if source not in (None, "auto", address.source):
        raise SettingsError(f"{model} is on {address.source}, not on {source}: remove one of the two.")
    if None not in (revision, address.revision) and revision != address.revision:
        raise SettingsError(f"{model} names the revision {address.revision}, not {revision}: remove one of the two.")
    return address.name, address.source, revision or address.revision


def _change(spec: ModelSpec, changes: dict[str, Any]) -> ModelSpec:
    """Return a configured model with other values. Under another alias it has no other names."""
    alias = changes.get("alias")
    if alias is None or alias in spec.aliases:
        return replace(spec, **changes | {"alias": spec.alias})
    return replace(spec, **changes, more_aliases={}, defaults=replace(spec.defaults, input_type=None))


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

    It says how to get the model of a hub. Empty for any other model.
    """
    name = str(spec.path or spec.name)
    if name.startswith(PATHS) or len(Path(name).parts) != 2 or directory_of(name) is None:
        return ""
    return (
        f" {name} is a directory here ({Path(name).absolute()}), and directories take precedence over the hubs. To use the "
        "model of a hub, name the hub: `--source` (EMB_PROVIDER_MODEL_SOURCE) huggingface or modelscope."
    )


@dataclass(frozen=True, slots=True)
class ResolvedName:
    """What a name refers to."""

    alias: str
    """First alias of the model."""
    listed: str
    """The alias under which the list of models has this name."""
    defaults: RequestDefaults = field(default_factory=RequestDefaults)
    """What requests get that use this name and do not say otherwise."""
    needs_prompts: bool = False
    """Whether the name exists only if the model has a prompt for queries and one for documents."""


class NameIndex:
    """The names of the served models: aliases, ids, and last parts of both that are unique.

    An alias takes precedence over an id, and an id over a last part. A name that several models share is ambiguous and
    refers to none; several aliases of one model are not ambiguous. An id of several configured models refers to the
    first one. Models that were added later change the meaning of no earlier name, because a client that uses it would
    get an error or the vectors of another model.
    """

    def __init__(self, configured: Iterable[ModelSpec], added: Iterable[ModelSpec] = ()) -> None:
        self._exact = _names_of(configured)
        self._folded = _fold(self._exact)
        for spec in added:
            names = _names_of([spec])
            # Its alias is not ambiguous, although several earlier models may have this last part.
            aliases = {alias: names[alias] for alias in spec.aliases if self._exact.get(alias) is None}
            self._exact = names | self._exact | aliases
            self._folded = _fold(names) | self._folded | _fold(aliases)

    def find(self, name: str) -> ResolvedName | None:
        """Return what a name refers to, or None if it is unknown or ambiguous."""
        return self._exact.get(name)

    def find_similar(self, name: str) -> ResolvedName | None:
        """Return what a name refers to, however a client changed it.

        Clients add `:latest` (Ollama) or `openai/` (LiteLLM). Case matters only if it makes a name unique. NAME-query
        and NAME-passage are names of a model whose requests have these values of `input_type`.
        """
        spellings = dict.fromkeys((name, name.removesuffix(_TAG)))
        spellings |= dict.fromkeys(each.removeprefix(_OPENAI) for each in spellings)
        return next(filter(None, (*map(self._find_folded, spellings), *map(self._find_side, spellings))), None)

    def _find_folded(self, name: str) -> ResolvedName | None:
        return self._exact.get(name) or self._folded.get(name.casefold())

    def _find_side(self, name: str) -> ResolvedName | None:
        base, _, side = name.rpartition("-")
        input_type = _SIDES.get(side.casefold())
        found = self._find_folded(base) if input_type is not None else None
        if found is None:
            return None
        return replace(found, defaults=replace(found.defaults, input_type=input_type), needs_prompts=True)


def _names_of(specs: Iterable[ModelSpec]) -> dict[str, ResolvedName | None]:
    """Return what each name refers to, or None if it is ambiguous among these models."""
    aliases: dict[str, ResolvedName] = {}
    ids: dict[str, ResolvedName] = {}
    last_parts: dict[str, dict[tuple[str, Path | None], ResolvedName]] = {}
    for spec in specs:
        of_spec = {alias: ResolvedName(spec.alias, alias, spec.defaults_of(alias)) for alias in spec.aliases}
        aliases |= of_spec
        of_id = ResolvedName(spec.alias, spec.alias, replace(spec.defaults, input_type=None))
        ids.setdefault(spec.name, of_id)
        for name, found in (*of_spec.items(), (spec.name, of_id)):
            models = last_parts.setdefault(name.rstrip("/").rpartition("/")[2], {})
            models.setdefault((spec.name, spec.path), found)
    unique = {name: next(iter(models.values())) if len(models) == 1 else None for name, models in last_parts.items()}
    return {**unique, **ids, **aliases}


def _fold(names: Mapping[str, ResolvedName | None]) -> dict[str, ResolvedName | None]:
    """Return what each name refers to in lower case, or None if that is ambiguous."""
    folded: dict[str, ResolvedName | None] = {}
    for name, found in names.items():
        key = name.casefold()
        folded[key] = found if folded.get(key, found) == found else None
    return folded
