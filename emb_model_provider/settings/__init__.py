"""The settings: read from the environment and `.env`, checked, and handed to each part in groups."""

from emb_model_provider.settings.fields import Lowered, MappingEntry, allowed_values
from emb_model_provider.settings.groups import (
    FIDELITY_FLOORS,
    PREFIX,
    BatchSettings,
    FidelitySettings,
    HubSettings,
    LifecycleSettings,
    LimitSettings,
    LogSettings,
    MemorySettings,
    ModelSettings,
    ServerSettings,
    TrustSettings,
)
from emb_model_provider.settings.settings import ServedModels, Settings

__all__ = [
    "FIDELITY_FLOORS",
    "PREFIX",
    "BatchSettings",
    "FidelitySettings",
    "HubSettings",
    "LifecycleSettings",
    "LimitSettings",
    "LogSettings",
    "Lowered",
    "MappingEntry",
    "MemorySettings",
    "ModelSettings",
    "ServedModels",
    "ServerSettings",
    "Settings",
    "TrustSettings",
    "allowed_values",
]
