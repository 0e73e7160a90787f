"""Which model a caller over HTTP may name, and how it is to be loaded."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from emb_model_provider.choosing import choose, resolve_source
from emb_model_provider.errors import NotAllowedError, RequestError

if TYPE_CHECKING:
    from emb_model_provider.api.schemas_manage import Which
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.settings import Settings


def spec_named(settings: Settings, asked: Which, alias: str | None = None) -> ModelSpec:
    """Return the model that a query means.

    A directory is one only where the settings name it: else a caller could have any directory of this machine read.
    Code of a repository that the settings do not name never runs, whatever they trust: who may manage models is not
    yet one who may run programs here.

    Raises: RequestError, NotAllowedError; SettingsError where the precision contradicts the settings.
    """
    name = asked.model_name
    for param, value in (("model_name", name), ("alias", alias)):
        if value is not None and (not value.isprintable() or value != value.strip() or not value):
            raise RequestError(
                f"Invalid value for '{param}' = {value!r}: take printable text without spaces around it.",
                param=param,
            )
    try:
        spec = choose(
            settings,
            name,
            alias=alias,
            source=asked.source,
            revision=asked.revision,
            precision=asked.precision,
        )
        is_directory = resolve_source(spec) == "local"
    except (OSError, RuntimeError, ValueError):  # what no system can look up
        raise RequestError(
            f"Invalid value for 'model_name' = {name!r}: give an alias, or a repository's id (owner/name).",
            param="model_name",
        ) from None
    if any(_same_files(spec, own) for own in settings.models().specs):
        return spec
    if is_directory:
        raise NotAllowedError(
            f"{name!r} is a directory here, and may not be named over HTTP: let the operator name it in "
            "EMB_PROVIDER_MODEL_MAPPING, or load it with `emb-provider` on that machine. If a repository is meant, "
            "add its hub: &source=huggingface or &source=modelscope."
        )
    return replace(spec, trust_remote_code=False)


def is_same(left: ModelSpec, right: ModelSpec) -> bool:
    """Whether both mean one model, loaded in one way. A hub that was named may be the one that `auto` is."""
    return resolve_source(left) == resolve_source(right) and replace(left, source=right.source) == right


def _same_files(left: ModelSpec, right: ModelSpec) -> bool:
    if resolve_source(left) != resolve_source(right):
        return False
    ours, theirs = ((each.name, each.path, each.endpoint, each.revision) for each in (left, right))
    return ours == theirs
