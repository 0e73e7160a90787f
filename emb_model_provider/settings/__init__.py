"""The settings: read from the environment and `.env`, checked, and handed to each part in groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from emb_model_provider.errors import SettingsError
from emb_model_provider.settings.fields import Lowered, MappingEntry, allowed_values
from emb_model_provider.settings.groups import (
    AGREEMENT_FLOORS,
    FIDELITY_FLOORS,
    PREFIX,
    BatchJobSettings,
    BatchSettings,
    FidelitySettings,
    HubSettings,
    LifecycleSettings,
    LimitSettings,
    LogSettings,
    MemorySettings,
    ModelSettings,
    ServerSettings,
    SettingsGroup,
    TrustSettings,
)

if TYPE_CHECKING:
    from pathlib import Path

    from pydantic.fields import FieldInfo

    from emb_model_provider.model_spec import ModelSpec

__all__ = [
    "AGREEMENT_FLOORS",
    "FIDELITY_FLOORS",
    "PREFIX",
    "BatchJobSettings",
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


@dataclass(frozen=True, slots=True)
class ServedModels:
    """The models that a registry starts with."""

    specs: tuple[ModelSpec, ...]
    """In the order of the settings; the first is the default model."""
    preload: tuple[str, ...]
    """Aliases that are loaded at startup."""
    required: tuple[str, ...] | None = None
    """Aliases of the models that `/ready` requires; None: those that are loaded at startup."""
    answers_unknown: bool = False
    """Whether the default model answers requests for unknown models."""


class Settings(BaseModel):
    """All settings, as one group for each part of the service."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    models: ModelSettings = Field(default_factory=ModelSettings)
    fidelity: FidelitySettings = Field(default_factory=FidelitySettings)
    hubs: HubSettings = Field(default_factory=HubSettings)
    trust: TrustSettings = Field(default_factory=TrustSettings)
    memory: MemorySettings = Field(default_factory=MemorySettings)
    batching: BatchSettings = Field(default_factory=BatchSettings)
    limits: LimitSettings = Field(default_factory=LimitSettings)
    batch_jobs: BatchJobSettings = Field(default_factory=BatchJobSettings)
    server: ServerSettings = Field(default_factory=ServerSettings)
    lifecycle: LifecycleSettings = Field(default_factory=LifecycleSettings)
    logs: LogSettings = Field(default_factory=LogSettings)

    _origins: Mapping[str, str] = PrivateAttr(default_factory=dict)

    @property
    def origins(self) -> Mapping[str, str]:
        """Where the settings that have a value come from: by setting, such as `HF_TOKEN` or `.env: EMB_PROVIDER_PORT`."""
        return self._origins

    def __eq__(self, other: object) -> bool:
        # Settings are equal wherever their values come from.
        return isinstance(other, Settings) and self.__dict__ == other.__dict__

    def with_origins(self, origins: Mapping[str, str]) -> Self:
        """Record where the values come from."""
        self._origins = origins
        return self

    @classmethod
    def groups(cls) -> dict[str, type[SettingsGroup]]:
        """Return the groups by their name, in the order in which they are documented."""
        return {name: info.annotation for name, info in cls.model_fields.items()}  # type: ignore[misc]

    @classmethod
    def variables(cls) -> dict[str, FieldInfo]:
        """Return all settings by their name: the variable in lower case, without the prefix."""
        return {name: info for group in cls.groups().values() for name, info in group.model_fields.items()}

    @classmethod
    def from_values(cls, **values: Any) -> Self:
        """Make settings from single values, such as `Settings.from_values(port=9001)`."""
        grouped: dict[str, Any] = {}
        for group, kind in cls.groups().items():
            grouped[group] = {name: values.pop(name) for name in kind.model_fields if name in values}
        return cls.model_validate(grouped | values)

    @model_validator(mode="after")
    def _check_preload(self) -> Self:
        self.served_models()
        return self

    def share_of_worker(self) -> Self:
        """Return the settings with the limits of one of WORKERS processes, so that all together keep those of the service.

        A body of MAX_BODY_MB is accepted by each.
        """
        count, memory, limits = self.lifecycle.workers, self.memory, self.limits
        limit, queue = memory.model_memory_limit, self.batching.max_queue_tokens
        pending_mb = max(limits.max_body_mb, limits.max_pending_body_bytes / count / 1000**2)
        return self.model_copy(
            update={
                "memory": memory.model_copy(
                    update={
                        "result_cache_mb": memory.result_cache_mb / count,
                        "model_memory_limit": None if limit is None else max(1, limit // count),
                    }
                ),
                "batching": self.batching.model_copy(update={"max_queue_tokens": queue and -(-queue // count)}),
                "limits": limits.model_copy(update={"max_pending_body_mb": pending_mb}),
            }
        )

    @property
    def batch_directory(self) -> Path:
        """The directory of the files of batches."""
        return self.batch_jobs.batch_dir or self.hubs.cache_dir / "batch"

    @property
    def serves_cached(self) -> bool:
        """Whether models on disk are served when a request names them."""
        if self.models.serve_cached is not None:
            return self.models.serve_cached
        return self.server.is_on_loopback or bool(self.server.accepted_keys)

    def served_models(self) -> ServedModels:
        """Return the configured models, and which of them are loaded at startup and required."""
        specs, limit = self.models.specs(), self.memory.max_loaded_models
        preload = self._choose("PRELOAD_MODELS", self.models.preload_models, specs)
        if preload is None:
            preload = tuple(spec.alias for spec in specs)[:limit]
        elif limit is not None and len(preload) > limit:
            raise SettingsError(
                f"{PREFIX}PRELOAD_MODELS={','.join(preload)}: must not be more than {PREFIX}MAX_LOADED_MODELS={limit}."
            )
        required = self._choose("REQUIRED_MODELS", self.models.required_models, specs)
        return ServedModels(specs, preload, required, answers_unknown=self.models.unknown_model == "default")

    @staticmethod
    def _choose(setting: str, names: tuple[str, ...] | None, specs: tuple[ModelSpec, ...]) -> tuple[str, ...] | None:
        """Return the first aliases of the models that a setting names."""
        if names is None or names == ("none",):
            return names and ()
        first_aliases = {alias: spec.alias for spec in specs for alias in spec.aliases}
        for alias in names:
            if alias not in first_aliases:
                raise SettingsError(f"{PREFIX}{setting}={alias}: must be one of {', '.join(first_aliases)}, or none.")
        return tuple(dict.fromkeys(map(first_aliases.__getitem__, names)))
