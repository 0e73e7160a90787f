"""Every setting of the service, read once at the start and handed to each part as its own group."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import model_validator

from emb_model_provider.errors import SettingsError
from emb_model_provider.model_spec import BUNDLED_MODEL, ModelSpec
from emb_model_provider.settings.fields import SettingsTable
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

if TYPE_CHECKING:
    from pydantic import SecretStr

    from emb_model_provider.model_spec import Precision
    from emb_model_provider.settings.fields import MappingEntry

PREFIX = "EMB_PROVIDER_"


class Settings(SettingsTable):
    """The settings as the user writes them, checked against each other, and the groups that come of them."""

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.min_batch_size > self.max_batch_size:
            raise SettingsError(
                f"{PREFIX}MIN_BATCH_SIZE={self.min_batch_size}: must not be more than "
                f"{PREFIX}MAX_BATCH_SIZE={self.max_batch_size}."
            )
        if self.max_pending_body_mb is not None and self.max_pending_body_mb < self.max_body_mb:
            raise SettingsError(
                f"{PREFIX}MAX_PENDING_BODY_MB={self.max_pending_body_mb:g}: must not be less than "
                f"{PREFIX}MAX_BODY_MB={self.max_body_mb:g}."
            )
        for alias in self.model_mapping:
            if not alias.strip() or alias != alias.strip() or not alias.isprintable():
                raise SettingsError(
                    f"{PREFIX}MODEL_MAPPING: {alias!r} is no usable alias: take printable text without spaces around it."
                )
        self.models()
        return self

    # --- groups ---------------------------------------------------------------------------------------

    def models(self) -> ModelSettings:
        """Return what to serve.

        Raises: SettingsError where two models have one name, or PRELOAD_MODELS names no model.
        """
        specs: list[ModelSpec] = []
        main = self._main_model()
        if main is not None:
            specs.append(main)
        specs.extend(self.mapped_model(alias, entry) for alias, entry in self.model_mapping.items())
        aliases = [spec.alias for spec in specs]
        if len(set(aliases)) < len(aliases):
            raise SettingsError(
                f"{PREFIX}MODEL_NAME={aliases[0]} is also an alias of {PREFIX}MODEL_MAPPING: rename one of them."
            )
        return ModelSettings(specs=tuple(specs), preload=self._preloaded(aliases))

    def hubs(self) -> HubSettings:
        return HubSettings(
            cache_dir=self.cache_dir,
            modelscope_cache_dir=self.modelscope_cache_dir,
            modelscope_endpoint=self.modelscope_endpoint,
            modelscope_token=_revealed(self.modelscope_token),
            hf_cache_dir=self.hf_cache_dir,
            hf_endpoint=self.hf_endpoint,
            hf_token=_revealed(self.hf_token),
            fallback_to_huggingface=self.modelscope_fallback_to_huggingface,
            offline=self.offline,
            names={
                name: {str(hub): there for hub, there in names.items()}
                for name, names in self.hub_names.items()
            },
        )

    def residency(self) -> ResidencySettings:
        return ResidencySettings(
            max_loaded_models=self.max_loaded_models,
            memory_limit_bytes=self.model_memory_limit,
            idle_unload_s=self.idle_unload_s,
            load_wait_s=self.request_timeout_s if self.load_wait_s is None else self.load_wait_s,
        )

    def trust(self) -> TrustSettings:
        return TrustSettings(modelscope=self.modelscope_trust_remote_code, others=self.trust_remote_code)

    def fidelity(self) -> FidelitySettings:
        return FidelitySettings(
            floors={**FIDELITY_FLOORS, **{str(name): floor for name, floor in self.fidelity_floors.items()}},
            measure=self.measure_fidelity,
        )

    def batching(self) -> BatchSettings:
        return BatchSettings(
            max_batch_size=self.max_batch_size,
            max_batch_tokens=self.max_batch_tokens,
            dynamic=self.enable_dynamic_batching,
            min_batch_size=self.min_batch_size,
            max_wait_s=self.max_wait_time_ms / 1000,
            max_queue_tokens=self.max_queue_tokens,
        )

    def limits(self) -> LimitSettings:
        return LimitSettings(
            request_timeout_s=self.request_timeout_s,
            max_inputs=self.max_inputs,
            max_request_tokens=self.max_request_tokens,
            max_body_bytes=int(self.max_body_mb * 1024 * 1024),
            strict_input=self.strict_input,
        )

    def server(self) -> ServerSettings:
        allowed = self.allowed_hosts
        if allowed is None and self.host in _LOOPBACK_NAMES:
            allowed = _LOOPBACK_NAMES
        elif allowed is not None and "*" in allowed:
            allowed = None
        return ServerSettings(
            host=self.host,
            port=self.port,
            api_keys=_keys(self.api_keys),
            admin_api_keys=_keys(self.admin_api_keys),
            allowed_hosts=allowed,
            cors_origins=self.cors_origins,
            receive_timeout_s=self.receive_timeout_s,
            max_pending_body_bytes=int((self.max_pending_body_mb or 8 * self.max_body_mb) * 1024 * 1024),
        )

    def lifecycle(self) -> LifecycleSettings:
        return LifecycleSettings(
            watchdog_s=self.watchdog_s, supervise=self.supervise, shutdown_grace_s=self.shutdown_grace_s
        )

    def logs(self) -> LogSettings:
        return LogSettings(
            level=self.log_level, format=self.log_format, to_file=self.log_to_file, directory=self.log_dir
        )

    # --- models ---------------------------------------------------------------------------------------

    def _main_model(self) -> ModelSpec | None:
        name, source = self.model_name, self.model_source
        if name is None and self.model_path is not None:
            name = self.model_path.resolve().name
        if name is None and self.model_mapping:
            return None
        if name is None:
            # MODEL_HUB or USE_MODELSCOPE alone must not turn the model that is already here into a download.
            name, source = BUNDLED_MODEL, "bundled"
        return ModelSpec(
            alias=name,
            name=name,
            source=source,
            path=self.model_path,
            revision=self.model_revision,
            precision=self._effective_precision(self.model_precision, f"{PREFIX}MODEL_PRECISION"),
            device=self.device,
            backend=self.backend,
        )

    def mapped_model(self, alias: str, entry: MappingEntry) -> ModelSpec:
        """Return the model that an entry means under these settings.

        Raises: SettingsError where its precision contradicts them.
        """
        precision = entry.precision or self.model_precision
        return ModelSpec(
            alias=alias,
            name=entry.name,
            source=entry.source or self.model_source,
            path=entry.path,
            revision=entry.revision,
            endpoint=entry.endpoint,
            token=_revealed(entry.token),
            cache_dir=entry.cache_dir,
            trust_remote_code=entry.trust_remote_code,
            precision=self._effective_precision(
                precision, f"the precision of {alias!r} in {PREFIX}MODEL_MAPPING"
            ),
            device=entry.device or self.device,
            backend=entry.backend or self.backend,
            pooling=entry.pooling,
            normalize=entry.normalize,
            max_length=entry.max_length,
            prompts=entry.prompts,
            dimensions=entry.dimensions,
            token_input=entry.token_input,
            truncate=entry.truncate,
        )

    def _effective_precision(self, precision: Precision, where: str) -> Precision:
        if precision in ("int8", "int4") and self.enable_quantization is False:
            raise SettingsError(
                f"{PREFIX}ENABLE_QUANTIZATION=false contradicts {where}={precision}: "
                "set it to true, leave it out, or choose fp32, fp16 or bf16."
            )
        return "int8" if precision == "auto" and self.enable_quantization else precision

    def _preloaded(self, aliases: list[str]) -> tuple[str, ...]:
        most = self.max_loaded_models
        if self.preload_models is None:
            return tuple(aliases[:most])
        if self.preload_models == ("none",):
            return ()
        if most is not None and len(self.preload_models) > most:
            raise SettingsError(
                f"{PREFIX}PRELOAD_MODELS={','.join(self.preload_models)}: must not be more than "
                f"{PREFIX}MAX_LOADED_MODELS={most}."
            )
        for alias in self.preload_models:
            if alias not in aliases:
                raise SettingsError(
                    f"{PREFIX}PRELOAD_MODELS={alias}: must be among {', '.join(aliases)}, or none."
                )
        return self.preload_models


_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")


def _revealed(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret is not None else None


def _keys(secret: SecretStr | None) -> tuple[str, ...]:
    listed = _revealed(secret) or ""
    return tuple(key.strip() for key in listed.split(",") if key.strip())
