"""Which model a command means: an alias from the settings, a repository's id, or a directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emb_model_provider.settings_loading import load_settings

if TYPE_CHECKING:
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.settings import Settings


@dataclass(frozen=True, slots=True)
class Chosen:
    """A model, and the settings that it is to be loaded with."""

    spec: ModelSpec
    settings: Settings


def choose(model: str, *, source: str | None = None) -> Chosen:
    """Return the model that `model` means; `source` says where a repository's id is from.

    Raises: SettingsError.
    """
    settings, _ = load_settings()
    if source is None:
        for spec in settings.models().specs:
            if model in (spec.alias, spec.name):
                return Chosen(spec, settings)
    directory = Path(model)
    alone: dict[str, Any] = {
        "model_name": model if not directory.is_dir() else directory.resolve().name,
        "model_path": directory if directory.is_dir() else None,
        "model_source": source or settings.model_source,
        "model_revision": None,
        "model_mapping": {},
        "preload_models": None,
    }
    settings = settings.model_copy(update=alone)
    return Chosen(settings.models().specs[0], settings)
