"""Which models are served, under which names, and in which state: in memory, or loaded when they are wanted."""

from emb_model_provider.registry.registry import Registry
from emb_model_provider.registry.slots import ModelStatus, State

__all__ = ["ModelStatus", "Registry", "State"]
