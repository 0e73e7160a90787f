"""The served models in memory: names, states, loading and unloading."""

from emb_model_provider.registry.model_entry import ModelStatus, State
from emb_model_provider.registry.registry import Registry, RegistryConfig

__all__ = ["ModelStatus", "Registry", "RegistryConfig", "State"]
