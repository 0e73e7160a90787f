"""The settings as the parts of the service get them: one group a part, in seconds and bytes, nothing left to choose."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emb_model_provider.model_spec import ModelSpec

FIDELITY_FLOORS: Mapping[str, float] = MappingProxyType(
    {"fp32": 0.999, "bf16": 0.999, "fp16": 0.999, "int8": 0.98, "int4": 0.9}
)
"""The lowest cosine to fp32 at which a model is served, by precision, where the operator sets no other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSettings:
    """How to reach the hubs, where a model does not say otherwise."""

    cache_dir: Path
    """This package's own cache: manifests and artifacts."""
    modelscope_cache_dir: Path | None = None
    modelscope_endpoint: str | None = None
    modelscope_token: str | None = field(default=None, repr=False)
    hf_cache_dir: Path | None = None
    hf_endpoint: str | None = None
    hf_token: str | None = field(default=None, repr=False)
    fallback_to_huggingface: bool = False
    offline: bool = False
    names: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """A model's name to what each hub calls it, where that differs."""

    def name_on(self, hub: str, name: str) -> str:
        """Return what `hub` calls the model that is asked for as `name`."""
        return self.names.get(name, {}).get(hub, name)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustSettings:
    """Whether code from a repository may run, by the hub it came from; a model's own word wins."""

    modelscope: bool = False
    others: bool = False

    def allows(self, spec: ModelSpec, hub: str) -> bool:
        """Whether code of a model that came from `hub` may run."""
        by_hub = self.modelscope if hub == "modelscope" else self.others
        return by_hub if spec.trust_remote_code is None else spec.trust_remote_code


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelitySettings:
    """How true to fp32 a model must be, and whether that is measured."""

    floors: Mapping[str, float] = field(default_factory=lambda: dict(FIDELITY_FLOORS))
    """Precision to the lowest cosine that is served, 0 to 1; every precision has one."""
    measure: bool = True
    """Whether a model that torch serves is measured. A compiled one always is: that is how it is verified."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """How inputs become batches. Times in seconds; None is a default by device or by measurement."""

    max_batch_size: int = 64
    max_batch_tokens: int | None = None
    dynamic: bool = True
    min_batch_size: int = 1
    max_wait_s: float = 0.05
    max_queue_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitSettings:
    """What one request may ask for."""

    request_timeout_s: float = 60.0
    max_inputs: int = 2048
    max_request_tokens: int = 300_000
    max_body_bytes: int = 32 * 1024 * 1024
    strict_input: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """Where the service listens and whom it answers."""

    host: str = "localhost"
    port: int = 9000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    admin_api_keys: tuple[str, ...] = field(default=(), repr=False)
    """Keys for routes that change something; without any, only a direct local caller may use those."""
    allowed_hosts: tuple[str, ...] | None = None
    """Host header values that are answered; None is any."""
    cors_origins: tuple[str, ...] = ()
    receive_timeout_s: float = 60.0
    """How long a client may take to send a request, head and body, from its first byte; for a new connection, from
    the moment it is open."""
    max_pending_body_bytes: int = 256 * 1024 * 1024
    """Of all requests together that are being read or answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LifecycleSettings:
    """How the service notices what is broken, comes back, and ends. Times in seconds."""

    watchdog_s: float = 60.0
    """How long one model batch may run before its model counts as hung."""
    supervise: bool = False
    shutdown_grace_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidencySettings:
    """Which models stay in memory, and for how long."""

    max_loaded_models: int | None = None
    memory_limit_bytes: int | None = None
    """Of all loaded models together."""
    idle_unload_s: float | None = None
    load_wait_s: float = 60.0
    """How long a request waits for its model to be loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSettings:
    """Where log lines go and how they look."""

    level: str = "INFO"
    format: Literal["auto", "text", "json"] = "auto"
    to_file: bool = True
    directory: Path = Path("logs")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSettings:
    """What is served."""

    specs: tuple[ModelSpec, ...]
    """In the order of the settings; the first is the default model."""
    preload: tuple[str, ...]
    """Aliases that are loaded at the start."""
