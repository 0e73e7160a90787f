"""The served models in memory: names, states, loading and unloading."""

from emb_model_provider.registry.lifecycle import RegistryConfig
from emb_model_provider.registry.model_entry import ModelStatus, PublishedModel, State
from emb_model_provider.registry.on_demand import FollowedModels, OnDemandModels
from emb_model_provider.registry.registry import Registry

__all__ = ["FollowedModels", "ModelStatus", "OnDemandModels", "PublishedModel", "Registry", "RegistryConfig", "State"]
