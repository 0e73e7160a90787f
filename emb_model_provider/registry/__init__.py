"""Which models are served, under which names, and in which state: in memory, or loaded when they are wanted."""

from emb_model_provider.registry.model_entry import ModelStatus, State
from emb_model_provider.registry.registry import Registry, RegistryConfig

__all__ = ["ModelStatus", "Registry", "RegistryConfig", "State"]
