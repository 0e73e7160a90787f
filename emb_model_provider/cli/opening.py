"""What commands begin with: the settings, the manager of models, and what a typed name means."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from emb_model_provider.cli.console import warn

if TYPE_CHECKING:
    from emb_model_provider.management.entries import CachedSnapshot
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.settings import Settings


def open_settings() -> Settings:
    """Read the settings; what is odd about them is said on stderr.

    Raises: SettingsError.
    """
    from emb_model_provider.settings_loading import load_settings

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
    from emb_model_provider.choosing import directory_of

    name, at, revision = typed.rpartition("@")
    known = {name for spec in settings.models().specs for name in (spec.alias, spec.name)}
    if not at or not name or not revision or typed in known or directory_of(typed) is not None:
        return typed, None
    return name, revision


def spec_of(settings: Settings, entry: CachedSnapshot) -> ModelSpec:
    """Return what to ask for to have a model that is on disk once more: its hub, revision and endpoint."""
    from emb_model_provider.choosing import choose

    spec = choose(settings, entry.name, source=entry.hub, revision=entry.asked_revision)
    return dataclasses.replace(spec, endpoint=entry.endpoint or spec.endpoint)
