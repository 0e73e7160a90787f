"""Every setting: the table that users write (`table.py`), and the groups that the parts of the service get (`groups.py`).

A setting documents itself: its description and what it allows are what `.env.example` and
`docs/configuration.md` show, and what an error quotes.
"""

from emb_model_provider.settings.fields import Lowered, MappingEntry, allowed_values
from emb_model_provider.settings.groups import (
    FIDELITY_FLOORS,
    BatchSettings,
    FidelitySettings,
    HubSettings,
    LifecycleSettings,
    LimitSettings,
    LogSettings,
    ModelSettings,
    ResidencySettings,
    ServerSettings,
    TrustSettings,
)
from emb_model_provider.settings.settings import PREFIX, Settings

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
    "ModelSettings",
    "ResidencySettings",
    "ServerSettings",
    "Settings",
    "TrustSettings",
    "allowed_values",
]
