"""Every setting of the service, read once at the start and handed to each part as its own group.

A setting documents itself: its description and what it allows are what `.env.example` and
`docs/configuration.md` show, and what an error quotes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import platformdirs
from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, SecretStr, model_validator

from emb_model_provider.errors import SettingsError
from emb_model_provider.model_spec import (
    BUNDLED_MODEL,
    BackendName,
    ModelSpec,
    Pooling,
    Precision,
    Source,
    TokenInput,
    Truncate,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic.fields import FieldInfo

PREFIX = "EMB_PROVIDER_"
HubOfNames = Literal["huggingface", "modelscope"]
FlooredPrecision = Literal["fp32", "bf16", "fp16", "int8", "int4"]
FIDELITY_FLOORS: Mapping[str, float] = MappingProxyType(
    {"fp32": 0.999, "bf16": 0.999, "fp16": 0.999, "int8": 0.98, "int4": 0.9}
)
"""The lowest cosine to fp32 at which a model is served, by precision, where the operator sets no other."""
DEVICE_PATTERN = r"^(auto|cpu|cuda(:\d+)?|mps)$"


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _comma_separated(value: object) -> object:
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _pooling_name(value: object) -> object:
    usual = {"last": "lasttoken", "last_token": "lasttoken", "weighted_mean": "weightedmean", "avg": "mean"}
    return usual.get(value.lower(), value.lower()) if isinstance(value, str) else value


def _expanded(value: object) -> object:
    return Path(value).expanduser() if isinstance(value, str) else value


Lowered = BeforeValidator(_lower)
Names = Annotated[tuple[str, ...], BeforeValidator(_comma_separated)]
Directory = Annotated[Path, BeforeValidator(_expanded)]


class MappingEntry(BaseModel):
    """One model of MODEL_MAPPING. What an entry leaves out is as the service's own settings say."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, Field(min_length=1)]
    source: Annotated[Source, Lowered] | None = None
    precision: Annotated[Precision, Lowered] | None = None
    revision: str | None = None
    path: Directory | None = None
    device: Annotated[str, Lowered, Field(pattern=DEVICE_PATTERN)] | None = None
    backend: Annotated[BackendName, Lowered] | None = None
    pooling: Annotated[Pooling, BeforeValidator(_pooling_name)] | None = None
    normalize: bool | None = None
    max_length: Annotated[int, Field(ge=1)] | None = None
    trust_remote_code: bool | None = None
    prompts: dict[str, str] | None = None
    token_input: Annotated[TokenInput, Lowered] = "reject"
    truncate: Annotated[Truncate, BeforeValidator(_upper)] = "END"
    dimensions: (
        Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | Literal["any"] | None
    ) = None
    endpoint: str | None = None
    token: SecretStr | None = None
    cache_dir: Directory | None = None


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


def _setting(default: Any, description: str, *, allowed: str = "", **constraints: Any) -> Any:
    extra: dict[str, Any] | None = {"allowed": allowed} if allowed else None
    return Field(default=default, description=description, json_schema_extra=extra, **constraints)


class Settings(BaseModel):
    """The settings as the user writes them, one field a variable `EMB_PROVIDER_<FIELD>`."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    model_name: str | None = _setting(
        None,
        "What to serve: a hub's repository id, or a directory. "
        f"Unset: the first entry of MODEL_MAPPING, or the bundled `{BUNDLED_MODEL}`.",
    )
    model_path: Directory | None = _setting(
        None, "A local directory that holds MODEL_NAME; wins over any hub.", allowed="a directory"
    )
    model_source: Annotated[Source, Lowered] = _setting(
        "auto",
        "The hub. auto: an existing directory is local; the bundled name is bundled; `damo/…` and `iic/…` "
        "come from ModelScope; anything else from Hugging Face. Where this is unset, "
        "`MODEL_HUB=modelscope|huggingface` and `USE_MODELSCOPE=true|false` are read.",
    )
    model_revision: str | None = _setting(None, "Branch, tag or commit. Unset: the hub's default branch.")
    model_mapping: dict[str, MappingEntry] = _setting(
        {},
        "JSON, over several lines if you like: alias → model. Only `name` is required; the other keys are "
        "`source`, `precision`, `revision`, `path`, `device`, `backend`, `pooling`, `normalize`, `max_length`, "
        "`trust_remote_code`, `prompts`, `token_input`, `truncate`, `dimensions`, `endpoint`, `token`, `cache_dir`. "
        "The first entry is the default model when MODEL_NAME is unset; when both are set, both are served.",
        allowed='JSON like {"alias": {"name": "owner/model"}}',
    )
    preload_models: Names | None = _setting(
        None,
        "Aliases to load at the start, separated by commas; the rest load at their first request. "
        "`none` loads nothing. Unset: all, or the first MAX_LOADED_MODELS of them.",
        allowed="aliases separated by commas, or none",
    )
    model_precision: Annotated[Precision, Lowered] = _setting(
        "auto",
        "How the model computes. auto: compiled on a CPU, bf16 where the processor has it (the vectors stay within "
        "0.999 of fp32, or they are not served), else fp32; torch on a CPU, fp32; on a CUDA device bf16 where it has "
        "that, else fp16. int8 and int4 hold the weights in fewer bits: see docs/precision.md.",
    )
    enable_quantization: bool | None = _setting(
        None, "true with precision auto means int8; false together with int8 or int4 is an error."
    )
    fidelity_floors: dict[FlooredPrecision, Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]] = (
        _setting(
            dict(FIDELITY_FLOORS),
            "A model whose lowest cosine to fp32, over some 500 texts, is below the floor of its precision is not served. "
            "Precisions that are left out keep these floors. auto takes nothing below 0.999, and fp32 where that or a "
            "floor asks for it; a model compiled at fp32, bf16 or fp16 is never served below 0.999.",
            allowed='JSON from a precision (fp32, bf16, fp16, int8 or int4) to 0 to 1, like {"int8": 0.99}',
        )
    )
    measure_fidelity: bool = _setting(
        True,
        "Measure how near a model that torch serves at less than fp32 comes to itself at fp32. It is loaded at fp32 for "
        "that, once, and the figure is kept. false: it is not, and FIDELITY_FLOORS binds only where a figure is known.",
    )
    device: Annotated[str, Lowered] = _setting(
        "auto",
        "Where the model runs. auto: CUDA where there is a device, else the CPU.",
        allowed="auto, cpu, cuda, cuda:N, mps",
        pattern=DEVICE_PATTERN,
    )
    backend: Annotated[BackendName, Lowered] = _setting(
        "auto",
        "What runs the model. auto: openvino on a CPU, compiled once and checked against sentence-transformers, with "
        "torch where that cannot be done; torch on any other device.",
    )
    modelscope_cache_dir: Directory | None = _setting(
        None,
        "Where ModelScope downloads go. Unset: MODELSCOPE_CACHE, MODEL_CACHE_DIR, or `~/.cache/modelscope`.",
        allowed="a directory",
    )
    hf_cache_dir: Directory | None = _setting(
        None,
        "Where Hugging Face downloads go. Unset: HF_HUB_CACHE, HF_HOME/hub, MODEL_CACHE_DIR, or "
        "`~/.cache/huggingface/hub`. Both hubs may have one directory: their layouts do not meet.",
        allowed="a directory",
    )
    cache_dir: Directory = _setting(
        Path(platformdirs.user_cache_dir("emb_model_provider", appauthor=False)),
        "What this service itself keeps: the manifests of snapshots, and compiled models. Default: the platform's user cache directory.",
        allowed="a directory",
    )
    max_artifacts_gb: float = _setting(
        20, "Most disk for compiled models in CACHE_DIR, in GiB; the least recently used go first.",
        allowed="more than 0", gt=0, allow_inf_nan=False,
    )  # fmt: skip
    modelscope_trust_remote_code: bool = _setting(
        False,
        "Let code that a ModelScope repository carries run in this process. Only for repositories you trust.",
    )
    trust_remote_code: bool = _setting(
        False, "The same for models from Hugging Face and from directories. Only for repositories you trust."
    )
    modelscope_endpoint: str | None = _setting(
        None,
        "A mirror of ModelScope. Unset: the client's own (MODELSCOPE_ENDPOINT, MODELSCOPE_DOMAIN).",
        allowed="a URL",
    )
    hf_endpoint: str | None = _setting(
        None, "A mirror of Hugging Face. Unset: the client's own (HF_ENDPOINT).", allowed="a URL"
    )
    modelscope_token: SecretStr | None = _setting(
        None, "Access token for private ModelScope models. Unset: MODELSCOPE_API_TOKEN. Never shown."
    )
    hf_token: SecretStr | None = _setting(
        None, "Access token for private or gated Hugging Face models. Unset: HF_TOKEN. Never shown."
    )
    modelscope_fallback_to_huggingface: bool = _setting(
        False,
        "Take a model that ModelScope does not have, or that cannot be fetched there, from Hugging Face under the "
        "same name. Logged, and shown in `/v1/models`.",
    )
    hub_names: dict[str, dict[HubOfNames, Annotated[str, Field(min_length=1)]]] = _setting(
        {},
        "JSON: a model's name, as it is asked for, to what each hub calls it, where that differs. It holds for whichever "
        "hub the model comes from, MODELSCOPE_FALLBACK_TO_HUGGINGFACE included.",
        allowed='JSON like {"acme/model": {"modelscope": "other/model"}}',
    )
    offline: bool = _setting(
        False, "Make no request to any hub; serve only what is already here. Unset: HF_HUB_OFFLINE."
    )
    max_loaded_models: int | None = _setting(
        None,
        "Most models in memory at a time. One more is loaded in place of the one whose last request is longest ago, "
        "after its requests have been answered. Unset: no limit.",
        allowed="1 or more",
        ge=1,
    )
    model_memory_limit: ByteSize | None = _setting(
        None,
        "Most memory for all loaded models together, in the same way; a number is bytes. What a model takes is shown by "
        "`emb-provider ps`; the process itself takes some 100 MiB more, or several hundred where torch serves. Unset: no limit.",
        allowed="bytes, or a size like 4GiB or 500MB",
        gt=0,
    )
    idle_unload_s: float | None = _setting(
        None,
        "Unload a model that has had no request for this many seconds; its next request loads it again. Unset: never.",
        allowed="more than 0",
        gt=0,
        allow_inf_nan=False,
    )
    load_wait_s: float | None = _setting(
        None,
        "How many seconds a request waits for its model to be fetched, compiled and loaded; then it gets 503 with "
        "`Retry-After`, and loading goes on. Unset: REQUEST_TIMEOUT_S.",
        allowed="0 or more",
        ge=0,
        allow_inf_nan=False,
    )
    max_batch_size: int = _setting(64, "Most sequences in one model batch.", allowed="1 or more", ge=1)
    max_batch_tokens: int | None = _setting(
        None,
        "Most padded tokens in one model batch; bounds memory. Unset: by device (512 on a CPU, where larger ones gain nothing and hold others up, 131072 on CUDA).",
        allowed="1 or more",
        ge=1,
    )
    enable_dynamic_batching: bool = _setting(True, "Group inputs of different requests into one batch.")
    min_batch_size: int = _setting(
        1, "Wait for at least this many inputs before a batch, at most MAX_WAIT_TIME_MS. 1: never wait.",
        allowed="1 or more, at most MAX_BATCH_SIZE", ge=1,
    )  # fmt: skip
    max_wait_time_ms: float = _setting(
        50, "Longest wait for MIN_BATCH_SIZE inputs, in milliseconds.", allowed="0 to 60000", ge=0, le=60_000
    )
    max_queue_tokens: int | None = _setting(
        None,
        "More tokens than this waiting for one model: new requests get 429. Unset: about 20 seconds of work, as measured.",
        allowed="1 or more",
        ge=1,
    )
    request_timeout_s: float = _setting(
        60, "A request not answered after this many seconds gets 504 and its work is dropped.",
        allowed="more than 0", gt=0, allow_inf_nan=False,
    )  # fmt: skip
    max_inputs: int = _setting(2048, "Most inputs in one request.", allowed="1 or more", ge=1)
    max_request_tokens: int = _setting(
        300_000, "Most tokens in all inputs of one request together.", allowed="1 or more", ge=1
    )
    max_body_mb: float = _setting(
        32, "Largest request body, in MiB.", allowed="more than 0", gt=0, allow_inf_nan=False
    )
    max_pending_body_mb: float | None = _setting(
        None,
        "Most that the bodies of all requests together may hold while they are read or answered, in MiB; beyond it a "
        "request gets 429. Bounds memory. Unset: eight times MAX_BODY_MB.",
        allowed="MAX_BODY_MB or more",
        gt=0,
        allow_inf_nan=False,
    )
    receive_timeout_s: float = _setting(
        60, "A client that has not sent its whole request after this many seconds gets 408, and its connection is closed.",
        allowed="more than 0", gt=0, allow_inf_nan=False,
    )  # fmt: skip
    strict_input: bool = _setting(
        False, "Refuse empty strings with 400, as api.openai.com does. false: an empty string gets a vector."
    )
    host: str = _setting("localhost", "Address to listen on. The container sets 0.0.0.0.")
    port: int = _setting(9000, "Port to listen on.", allowed="1 to 65535", ge=1, le=65_535)
    api_keys: SecretStr | None = _setting(
        None,
        "Keys, separated by commas. Set: every `/v1` route asks for one of them as a Bearer token. Never shown.",
    )
    admin_api_keys: SecretStr | None = _setting(
        None,
        "Keys, separated by commas, for routes that change something (`/api/…`). Unset: those answer only a direct "
        "caller on the same machine, no proxy and no page of another site. Never shown.",
    )
    allowed_hosts: Names | None = _setting(
        None,
        "Host header values that are answered, separated by commas; `*` is any. "
        "Unset: loopback names while bound to loopback, else any.",
        allowed="host names separated by commas",
    )
    cors_origins: Names = _setting(
        (),
        "Browser origins that may call the API, separated by commas; `*` is any. Unset: none.",
        allowed="origins separated by commas",
    )
    watchdog_s: float = _setting(
        60,
        "A model batch that runs longer than this many seconds (or ten times as long as its tokens should take, if that "
        "is more) counts as hung: `/ready` says so. Where all that a model can run side by side hangs, it takes no more "
        "requests until something is through.",
        allowed="more than 0",
        gt=0,
        allow_inf_nan=False,
    )
    supervise: bool = _setting(
        False,
        "Start the service as a child of a small process that keeps the port open and starts it again when it crashes or "
        "hangs. For bare machines; in a container the restart policy does that.",
    )
    shutdown_grace_s: float = _setting(
        60, "How many seconds accepted requests have to finish after SIGTERM or Ctrl-C. A second signal ends at once.",
        allowed="0 or more", ge=0, allow_inf_nan=False,
    )  # fmt: skip
    log_level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], BeforeValidator(_upper)
    ] = _setting("INFO", "Least severe log lines to write.")
    log_format: Annotated[Literal["auto", "text", "json"], Lowered] = _setting(
        "auto", "How log lines look. auto: text on a terminal, else json."
    )
    log_to_file: bool = _setting(
        True, "Also write `emb_model_provider.log` in LOG_DIR, rotated by size and age."
    )
    log_dir: Directory = _setting(Path("logs"), "Where the log file goes.", allowed="a directory")

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


def allowed_values(info: FieldInfo) -> str:
    """Return in words what a setting takes, or an empty string where any text will do."""
    extra = info.json_schema_extra
    if isinstance(extra, dict) and "allowed" in extra:
        return str(extra["allowed"])
    text = str(info.annotation)
    if "bool" in text:
        return "true, false"
    choices = _literal_values(info.annotation)
    return ", ".join(choices)


def _literal_values(annotation: Any) -> list[str]:
    values = getattr(annotation, "__args__", ())
    if getattr(annotation, "__origin__", None) is Literal:
        return [str(value) for value in values]
    return [value for inner in values for value in _literal_values(inner)]
