"""The settings as the user writes them: what each is called, takes, means, and is where it is not set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import platformdirs
from pydantic import BaseModel, BeforeValidator, ByteSize, ConfigDict, Field, SecretStr

from emb_model_provider.errors import SettingsError
from emb_model_provider.model_spec import (
    BUNDLED_MODEL,
    BackendName,
    Pooling,
    Precision,
    Source,
    TokenInput,
    Truncate,
)
from emb_model_provider.settings.groups import FIDELITY_FLOORS

if TYPE_CHECKING:
    from pydantic.fields import FieldInfo


HubOfNames = Literal["huggingface", "modelscope"]
FlooredPrecision = Literal["fp32", "bf16", "fp16", "int8", "int4"]
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
    if not isinstance(value, str):
        return value
    try:
        return Path(value).expanduser()
    except RuntimeError as error:  # which is no mistake in pydantic's eyes
        raise ValueError(f"{value}: ~ leads to no home directory here") from error


Lowered = BeforeValidator(_lower)
Uppered = BeforeValidator(_upper)
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
    truncate: Annotated[Truncate, Uppered] = "END"
    dimensions: (
        Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | Literal["any"] | None
    ) = None
    endpoint: str | None = None
    token: SecretStr | None = None
    cache_dir: Directory | None = None


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


def _setting(default: Any, description: str, *, allowed: str = "", **constraints: Any) -> Any:
    extra: dict[str, Any] | None = {"allowed": allowed} if allowed else None
    return Field(default=default, description=description, json_schema_extra=extra, **constraints)


def _own_cache() -> Path:
    try:
        return Path(platformdirs.user_cache_dir("emb_model_provider", appauthor=False))
    except RuntimeError as error:
        raise SettingsError(
            "This user has no home directory, where caches usually are. Set EMB_PROVIDER_CACHE_DIR, or HOME."
        ) from error


class SettingsTable(BaseModel):
    """One field a variable `EMB_PROVIDER_<FIELD>`."""

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
    cache_dir: Directory = Field(
        default_factory=_own_cache,
        description="What this service itself keeps: the manifests of snapshots, and compiled models. "
        "Default: the platform's user cache directory.",
        json_schema_extra={"allowed": "a directory"},
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
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], Uppered] = _setting(
        "INFO", "Least severe log lines to write."
    )
    log_format: Annotated[Literal["auto", "text", "json"], Lowered] = _setting(
        "auto", "How log lines look. auto: text on a terminal, else json."
    )
    log_to_file: bool = _setting(
        True, "Also write `emb_model_provider.log` in LOG_DIR, rotated by size and age."
    )
    log_dir: Directory = _setting(Path("logs"), "Where the log file goes.", allowed="a directory")
