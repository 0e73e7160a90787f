"""The settings, in groups.

The name of a field is the name of its variable in lower case, without the prefix `EMB_PROVIDER_`. `.env.example` and
the table in docs/configuration.md are generated from its docstring, default and allowed values.
"""

from __future__ import annotations

from collections.abc import Mapping  # noqa: TC003 - pydantic reads it
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal, Self

import platformdirs
from pydantic import AfterValidator, BaseModel, ByteSize, ConfigDict, Field, SecretStr, model_validator

from emb_model_provider.errors import SettingsError
from emb_model_provider.model_spec import (
    BUNDLED_MODEL,
    BackendName,
    ModelSpec,
    Precision,
    RepositoryAddress,
    RequestDefaults,
    Source,
    name_of_directory,
    parse_address,
)
from emb_model_provider.settings.fields import (
    Allowed,
    Count,
    Device,
    Directory,
    FidelityPrecision,
    Lowered,
    MappingEntry,
    Names,
    NonNegativeNumber,
    PositiveNumber,
    RemoteHubName,
    Uppered,
    Url,
)
from emb_model_provider.settings.hosts import ANY, is_loopback_host, parse_host

PREFIX = "EMB_PROVIDER_"

FIDELITY_FLOORS: Mapping[FidelityPrecision, float] = {
    "fp32": 0.999, "bf16": 0.999, "fp16": 0.999, "int8": 0.98, "int4": 0.9
}  # fmt: skip
"""Default lowest cosine to fp32 at which a model is served, by precision."""

AGREEMENT_FLOORS: Mapping[FidelityPrecision, float] = {
    "fp32": 0.99, "bf16": 0.98, "fp16": 0.98, "int8": 0.95, "int4": 0.85
}  # fmt: skip
"""Default lowest agreement of other results than dense vectors at which a model is served, by precision."""

_MB = 1000**2
_GB = 1000**3


class SettingsGroup(BaseModel):
    """Settings that belong together. Each field is one variable; the title is the heading in the documents."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True, use_attribute_docstrings=True)


class ModelSettings(SettingsGroup, title="Models"):
    """Which models are served, and how they compute by default."""

    model_name: str | None = None
    """Model to serve: a repository id on a hub, the URL of its page there, or a directory. Unset: the first entry of MODEL_MAPPING, or the bundled
    `sentence-transformers/all-MiniLM-L6-v2`."""
    model_path: Directory | None = None
    """Local directory that holds MODEL_NAME. It takes precedence over any hub."""
    model_source: Annotated[Source, Lowered] = "auto"
    """Hub to load from. auto: an existing directory is local; the bundled name is bundled; `damo/…` and `iic/…` come
    from ModelScope; everything else comes from Hugging Face. If unset, `MODEL_HUB=modelscope|huggingface` and
    `USE_MODELSCOPE=true|false` are read."""
    model_revision: str | None = None
    """Branch, tag or commit. Unset: the hub's default branch."""
    model_mapping: Annotated[dict[str, MappingEntry], Allowed('JSON like {"alias": {"name": "owner/model"}}')] = {}
    """JSON object, possibly over several lines: alias → model. Only `name` or `path` is required; the other keys are
    `source`, `precision`, `revision`, `device`, `backend`, `kind` (what the model computes, if its files do not say it:
    dense, reranker, classifier, sparse, multi-vector or bge-m3), `raw_scores` (true: scores are logits), `long_documents`
    (windows: a document that does not fit next to its query gets the best score of its parts; cut), `pooling`, `normalize`, `max_length`, `trust_remote_code`,
    `prompts`, `token_input`, `truncate`, `dimensions`, `endpoint`, `token`, `cache_dir`, `aliases` (a list of further
    aliases) and `input_type` (of requests that have none). Entries that differ only in their alias, `input_type`,
    `raw_scores` and `long_documents` are one model in memory. The first entry is the default model if MODEL_NAME is unset; if both are set, both are served."""
    unknown_model: Annotated[Literal["error", "default"], Lowered] = "error"
    """Response to a request for embeddings with an unknown model name. error: 404. default: the vectors of the default
    model, for clients that send a fixed name."""
    serve_cached: bool | None = None
    """Serve every complete model on disk by its id: it is loaded when a request names it, and the least recently used model
    leaves memory if there is not enough of it. false: only the models of the settings and those that were added with `load`;
    an error says how to load another one. Unset: true if the service listens on loopback only, or if API_KEYS is set."""
    preload_models: Annotated[Names, Allowed("aliases separated by commas, or none")] | None = None
    """Aliases to load at startup, separated by commas; the others are loaded at their first request. `none` loads
    nothing. Unset: all, or the first MAX_LOADED_MODELS of them."""
    required_models: Annotated[Names, Allowed("aliases separated by commas, or none")] | None = None
    """Aliases of the models that `/ready` requires, separated by commas: it is 503 while one of them cannot answer. With
    `none` it does not depend on models. Unset: all models that are loaded at startup."""
    model_precision: Annotated[Precision, Lowered] = "auto"
    """Precision of the computation. auto: for a model compiled on a CPU, bf16 if the processor supports it (and the
    vectors stay within 0.999 of fp32), else fp32; for torch on a CPU, fp32; on a CUDA device, fp16, or bf16 for a model that is
    stored at bf16. int8 and int4 store the weights in fewer bits: see docs/precision.md."""
    enable_quantization: bool | None = None
    """true with precision auto means int8; false together with int8 or int4 is an error."""
    device: Device = "auto"
    """Device the model runs on. auto: CUDA if PyTorch can use a device, else the CPU, where static embeddings always are."""
    backend: Annotated[BackendName, Lowered] = "auto"
    """Runtime of the model. auto: on a CPU openvino, compiled once and checked against sentence-transformers, or torch
    if the model cannot be compiled; torch on any other device; for static embeddings, neither of them."""

    torch_while_compiling: bool = True
    """Serve a model with torch, at fp32 in a process of its own, while it is compiled for the first time. Its requests are
    answered after seconds instead of a minute, and the compiled model takes over without a failed request. Applies to BACKEND
    auto, and not to int8 and int4, whose vectors would differ. false: requests wait for the compiler."""

    @model_validator(mode="after")
    def _check_aliases(self) -> Self:
        aliases = [alias for spec in self._separate_specs() for alias in spec.aliases]
        for alias in aliases:
            if not alias.strip() or alias != alias.strip() or not alias.isprintable():
                raise SettingsError(
                    f"{PREFIX}MODEL_MAPPING: {alias!r} is not a valid alias: use printable text without "
                    "surrounding spaces."
                )
            if aliases.count(alias) > 1:
                kind = f"{PREFIX}MODEL_NAME={alias}" if alias == self.model_name else f"{PREFIX}MODEL_MAPPING: {alias}"
                raise SettingsError(f"{kind} is also an alias in {PREFIX}MODEL_MAPPING: rename one of them.")
        return self

    def specs(self) -> tuple[ModelSpec, ...]:
        """Return the configured models in the order of the settings; the first is the default model.

        Entries that differ only in their aliases and the defaults of requests are one model, which is loaded once.
        """
        merged: list[ModelSpec] = []
        for spec in self._separate_specs():
            for index, other in enumerate(merged):
                if spec == replace(other, alias=spec.alias, defaults=spec.defaults, more_aliases=spec.more_aliases):
                    more = {**other.more_aliases, spec.alias: spec.defaults, **spec.more_aliases}
                    merged[index] = replace(other, more_aliases=more)
                    break
            else:
                merged.append(spec)
        return tuple(merged)

    def _separate_specs(self) -> list[ModelSpec]:
        """Return a model for MODEL_NAME and each entry of MODEL_MAPPING."""
        main = self._main_model()
        mapped = [self.spec_for(alias, entry) for alias, entry in self.model_mapping.items()]
        return [main, *mapped] if main is not None else mapped

    def spec_for(self, alias: str, entry: MappingEntry) -> ModelSpec:
        """Return the model that a mapping entry describes, with the service-wide defaults applied."""
        values = dict(entry)
        defaults = RequestDefaults(**{each.name: values.pop(each.name) for each in fields(RequestDefaults)})
        values |= {
            "defaults": defaults,
            "more_aliases": dict.fromkeys(entry.aliases, defaults),
            "source": entry.source or self.model_source,
            "token": _reveal(entry.token),
            "precision": self._effective_precision(
                entry.precision or self.model_precision, f"the precision of {alias!r} in {PREFIX}MODEL_MAPPING"
            ),
            "device": entry.device or self.device,
            "backend": entry.backend or self.backend,
        }
        del values["aliases"]
        return ModelSpec(alias=alias, **values)

    def _main_model(self) -> ModelSpec | None:
        name, source, revision = self.model_name, self.model_source, self.model_revision
        if (address := self._address) is not None:
            name, source, revision = address.name, address.source, revision or address.revision
        if name is None and self.model_path is not None:
            name = name_of_directory(self.model_path)
        elif name is None and self.model_mapping:
            return None
        elif name is None:
            # MODEL_HUB or USE_MODELSCOPE alone must not turn the bundled model into a download.
            name, source = BUNDLED_MODEL, "bundled"
        return ModelSpec(
            alias=name,
            name=name,
            source=source,
            path=self.model_path,
            revision=revision,
            precision=self._effective_precision(self.model_precision, f"{PREFIX}MODEL_PRECISION"),
            device=self.device,
            backend=self.backend,
        )

    @property
    def _address(self) -> RepositoryAddress | None:
        """The repository, if MODEL_NAME is a URL of a hub."""
        if self.model_name is None or self.model_path is not None:
            return None
        try:
            address = parse_address(self.model_name)
        except ValueError as error:
            raise SettingsError(f"{PREFIX}MODEL_NAME: {error}.") from None
        if address is not None and self.model_source not in ("auto", address.source):
            raise SettingsError(
                f"{PREFIX}MODEL_NAME={self.model_name}: contradicts {PREFIX}MODEL_SOURCE={self.model_source}: "
                "remove one of the two."
            )
        return address

    def _effective_precision(self, precision: Precision, where: str) -> Precision:
        if precision in ("int8", "int4") and self.enable_quantization is False:
            raise SettingsError(
                f"{PREFIX}ENABLE_QUANTIZATION=false contradicts {where}={precision}: "
                "set it to true, remove it, or choose fp32, fp16 or bf16."
            )
        return "int8" if precision == "auto" and self.enable_quantization else precision


class FidelitySettings(SettingsGroup, title="Accuracy"):
    """How close to fp32 a model must be, and whether that is measured."""

    fidelity_floors: Annotated[
        dict[FidelityPrecision, Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]],
        Allowed('JSON from a precision (fp32, bf16, fp16, int8 or int4) to 0 to 1, like {"int8": 0.99}'),
    ] = dict(FIDELITY_FLOORS)
    """A model whose lowest cosine to fp32, over about 500 texts, is below the floor of its precision is not served.
    Precisions that are left out keep the default floors. auto never accepts less than 0.999: it uses fp32 instead. So
    does bf16 on a CPU if it is below its floor. A model compiled at fp32 or fp16 is never served below 0.999."""
    agreement_floors: Annotated[
        dict[FidelityPrecision, Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]],
        Allowed('JSON from a precision (fp32, bf16, fp16, int8 or int4) to 0 to 1, like {"int8": 0.97}'),
    ] = dict(AGREEMENT_FLOORS)
    """Likewise for scores, sparse vectors and token vectors: the lowest agreement with fp32, at most 1, which
    docs/precision.md defines. auto never accepts less than 0.98."""
    measure_fidelity: bool = True
    """Measure how close a model that torch serves below fp32 comes to itself at fp32. The model is loaded at fp32 once
    for this, and the result is kept. false: it is not measured, and FIDELITY_FLOORS applies only where a result is
    known."""

    @property
    def floors(self) -> Mapping[str, float]:
        """The floor of every precision: FIDELITY_FLOORS, with the defaults for precisions that it leaves out."""
        return {str(name): floor for name, floor in {**FIDELITY_FLOORS, **self.fidelity_floors}.items()}

    @property
    def lowest_agreement(self) -> Mapping[str, float]:
        """Likewise for AGREEMENT_FLOORS."""
        return {str(name): floor for name, floor in {**AGREEMENT_FLOORS, **self.agreement_floors}.items()}


def _default_cache_dir() -> Path:
    try:
        return Path(platformdirs.user_cache_dir("emb_model_provider", appauthor=False))
    except RuntimeError as error:
        raise SettingsError(
            "This user has no home directory for the default cache. Set EMB_PROVIDER_CACHE_DIR or HOME."
        ) from error


class HubSettings(SettingsGroup, title="Downloads and caches"):
    """How the hubs are reached, and where files are kept. A model's own values take precedence."""

    modelscope_cache_dir: Directory | None = None
    """Directory for ModelScope downloads. Unset: MODELSCOPE_CACHE, MODEL_CACHE_DIR, or `~/.cache/modelscope`."""
    hf_cache_dir: Directory | None = None
    """Directory for Hugging Face downloads. Unset: HF_HUB_CACHE, HF_HOME/hub, MODEL_CACHE_DIR, or
    `~/.cache/huggingface/hub`. Both hubs can share one directory: their layouts do not overlap."""
    cache_dir: Directory = Field(default_factory=_default_cache_dir)
    """Directory for the service's own files: manifests of snapshots, and compiled models. Default: the platform's user
    cache directory."""
    max_artifacts_gb: PositiveNumber = 20
    """Disk limit for compiled models in CACHE_DIR, in GB; the least recently used are removed first."""
    compile_timeout_s: NonNegativeNumber = 1800
    """Longest time that compiling a model may take, in seconds. After that torch serves the model, and it is compiled
    again only if this limit is raised; with BACKEND=openvino it is an error. 0: no limit."""
    tune_s: NonNegativeNumber = 5
    """Seconds in which, while a model is compiled, the fastest options of its runtime are chosen by measurement on this
    processor. `/v1/models/{id}` shows them. 0: defaults."""
    modelscope_endpoint: Url | None = None
    """URL of a ModelScope mirror. Unset: the client's own (MODELSCOPE_ENDPOINT, MODELSCOPE_DOMAIN)."""
    hf_endpoint: Url | None = None
    """URL of a Hugging Face mirror. Unset: the client's own (HF_ENDPOINT)."""
    modelscope_token: SecretStr | None = None
    """Access token for private ModelScope models. Unset: MODELSCOPE_API_TOKEN. Never shown."""
    hf_token: SecretStr | None = None
    """Access token for private or gated Hugging Face models. Unset: HF_TOKEN. Never shown."""
    modelscope_fallback_to_huggingface: bool = False
    """Load a model that ModelScope does not have, or that cannot be downloaded there, from Hugging Face under the same
    name. This is logged, and shown in `/v1/models`."""
    hub_names: Annotated[
        dict[str, dict[RemoteHubName, Annotated[str, Field(min_length=1)]]],
        Allowed('JSON like {"acme/model": {"modelscope": "other/model"}}'),
    ] = {}
    """JSON object from a model's requested name to its name on each hub, where they differ. It applies to whichever hub
    the model comes from, including MODELSCOPE_FALLBACK_TO_HUGGINGFACE."""
    offline: bool = False
    """Send no request to any hub; serve only what is already on disk. Unset: HF_HUB_OFFLINE."""

    def name_on(self, hub: str, name: str) -> str:
        """Return the name that `hub` uses for the model that is requested as `name`."""
        names: Mapping[str, str] = {str(key): value for key, value in self.hub_names.get(name, {}).items()}
        return names.get(hub, name)

    def endpoint(self, hub: str) -> str | None:
        """Return the mirror of a hub, or None for the client's own endpoint."""
        return {"modelscope": self.modelscope_endpoint, "huggingface": self.hf_endpoint}.get(hub)

    def token(self, hub: str) -> str | None:
        """Return the access token for a hub, or None for the client's own."""
        return _reveal({"modelscope": self.modelscope_token, "huggingface": self.hf_token}.get(hub))

    def hub_cache_dir(self, hub: str) -> Path | None:
        """Return the download directory of a hub, or None for the client's own."""
        return {"modelscope": self.modelscope_cache_dir, "huggingface": self.hf_cache_dir}.get(hub)

    @property
    def max_artifact_bytes(self) -> int:
        return int(self.max_artifacts_gb * _GB)


class TrustSettings(SettingsGroup, title="Code from repositories"):
    """Whether code from a repository may run, by the hub that the model comes from."""

    modelscope_trust_remote_code: bool = False
    """Allow code from ModelScope repositories to run in this process. Only for repositories you trust."""
    trust_remote_code: bool = False
    """The same for models from Hugging Face and from directories. Only for repositories you trust."""

    def allows(self, spec: ModelSpec, hub: str) -> bool:
        """Return whether code of a model that came from `hub` may run. The model's own setting takes precedence."""
        by_hub = self.modelscope_trust_remote_code if hub == "modelscope" else self.trust_remote_code
        return by_hub if spec.trust_remote_code is None else spec.trust_remote_code


class MemorySettings(SettingsGroup, title="Models in memory"):
    """Which models stay in memory, and for how long."""

    max_loaded_models: Count | None = None
    """Maximum number of models in memory. A further model replaces the least recently used one, after that one's
    requests have been answered. Unset: no limit."""
    model_memory_limit: Annotated[ByteSize, Field(gt=0), Allowed("bytes, or a size like 4GB or 500MB")] | None = None
    """Memory limit for all loaded models together, applied in the same way; a plain number is bytes. `emb-provider ps`
    shows what each model takes; the process itself takes about 100 MB more, or several hundred with torch. Unset: no
    limit, but with SERVE_CACHED and without MAX_LOADED_MODELS, models are unloaded if all together take more than three
    quarters of the memory of the machine or the container."""
    idle_unload_s: PositiveNumber | None = None
    """Unload a model that has had no request for this many seconds; its next request loads it again. Unset: never."""
    load_wait_s: NonNegativeNumber | None = None
    """How many seconds a request waits for its model to be downloaded, compiled and loaded. After that it gets 503 with
    `Retry-After`, and loading continues. Unset: REQUEST_TIMEOUT_S."""
    result_cache_mb: NonNegativeNumber = 64
    """Memory for the vectors of recent inputs of all models, in MB. An input with exactly the same tokens is answered
    without computing it again, as long as its model stays loaded. 0: every input is computed."""

    @property
    def result_cache_bytes(self) -> int:
        return int(self.result_cache_mb * _MB)


class BatchSettings(SettingsGroup, title="Batching"):
    """How inputs are grouped into batches."""

    max_batch_size: Count | None = None
    """Maximum number of sequences in one batch. Unset: 64, or 1024 for batches without padding (packed ones on CUDA, and
    static embeddings)."""
    max_batch_tokens: Count | None = None
    """Maximum number of padded tokens in one batch; bounds memory. Unset: by device (512 on a CPU, where larger batches
    gain nothing and delay other requests; on CUDA 131072, or 65536 without padding, or what fits into its memory)."""
    enable_dynamic_batching: bool = True
    """Group inputs of different requests into one batch."""
    min_batch_size: Annotated[Count, Allowed("1 or more, at most MAX_BATCH_SIZE")] = 1
    """Wait for at least this many inputs before running a batch, at most MAX_WAIT_TIME_MS. 1: never wait."""
    max_wait_time_ms: Annotated[float, Field(ge=0, le=60_000), Allowed("0 to 60000")] = 50
    """Longest wait for MIN_BATCH_SIZE inputs, in milliseconds."""
    max_queue_tokens: Count | None = None
    """Maximum number of tokens that wait for one model; beyond it, new requests get 429. Unset: as many as fit into
    250 MB of memory, several million."""

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.min_batch_size > (most := self.max_batch_size or 64):
            raise SettingsError(
                f"{PREFIX}MIN_BATCH_SIZE={self.min_batch_size}: must not be more than {PREFIX}MAX_BATCH_SIZE={most}."
            )
        return self


class LimitSettings(SettingsGroup, title="Limits of requests"):
    """What requests may take."""

    request_timeout_s: PositiveNumber = 60
    """A request gets 504, and its work is dropped, if its model completes no batch in this many seconds. As long as the
    model makes progress, requests wait for their turn."""
    request_total_timeout_s: PositiveNumber | None = None
    """A request that is not answered after this many seconds gets 504, whatever progress its model makes. Unset: five times
    the time that the model needs for MAX_REQUEST_TOKENS and the requests before it at its measured speed, at least ten times
    REQUEST_TIMEOUT_S."""
    max_inputs: Count = 2048
    """Maximum number of inputs in one request."""
    max_request_tokens: Count = 300_000
    """Maximum number of tokens in all inputs of one request together."""
    max_body_mb: PositiveNumber = 32
    """Largest request body, in MB."""
    max_pending_body_mb: Annotated[PositiveNumber, Allowed("MAX_BODY_MB or more")] | None = None
    """Maximum size of the bodies of all requests that are being read or answered, in MB; beyond it a request gets 429.
    Bounds memory. Unset: eight times MAX_BODY_MB."""
    receive_timeout_s: PositiveNumber = 60
    """A client that has not sent its whole request after this many seconds gets 408, and its connection is closed. An upload
    may take longer, as long as each MB of it arrives within this time."""
    strict_input: bool = False
    """Reject empty strings with 400, as api.openai.com does. false: an empty string gets a vector."""

    @model_validator(mode="after")
    def _check_body_sizes(self) -> Self:
        if self.max_pending_body_mb is not None and self.max_pending_body_mb < self.max_body_mb:
            raise SettingsError(
                f"{PREFIX}MAX_PENDING_BODY_MB={self.max_pending_body_mb:g}: must not be less than "
                f"{PREFIX}MAX_BODY_MB={self.max_body_mb:g}."
            )
        return self

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * _MB)

    @property
    def max_pending_body_bytes(self) -> int:
        return int((self.max_pending_body_mb or 8 * self.max_body_mb) * _MB)


def _check_database_url(value: SecretStr) -> SecretStr:
    """Return a URL for SQLAlchemy: `postgresql://` and `postgres://`, as hosting services write them, name no driver."""
    url = value.get_secret_value().strip()
    scheme, separator, rest = url.partition("://")
    if scheme in ("postgres", "postgresql"):
        scheme = "postgresql+psycopg"
    if scheme != "postgresql+psycopg" or not separator or not rest.strip("/"):
        raise ValueError("must be a URL like postgresql+psycopg://user:password@host/database")
    return SecretStr(f"{scheme}://{rest}")


class BatchJobSettings(SettingsGroup, title="Batches"):
    """The Batch API: files of requests that are answered in the background."""

    batches: bool = True
    """Serve `/v1/files` and `/v1/batches`. false: they do not exist, and unfinished batches wait."""
    batch_dir: Directory | None = None
    """Directory of the files of batches, and of their database without DATABASE_URL. Several services that work on the same batches
    share it. Unset: `batch` in CACHE_DIR."""
    database_url: (
        Annotated[
            SecretStr,
            AfterValidator(_check_database_url),
            Allowed("a URL like postgresql+psycopg://user:password@host/database"),
        ]
        | None
    ) = None
    """PostgreSQL database of the batches, for several services that work on the same batches. Requires the extra `postgresql`. Unset:
    a file in BATCH_DIR, for one service. Never shown."""
    max_file_bytes: Annotated[ByteSize, Field(gt=0), Allowed("bytes, or a size like 200MB")] = ByteSize(200 * _MB)
    """Largest file that can be uploaded for a batch; a plain number is bytes. MAX_BODY_MB and MAX_PENDING_BODY_MB do not apply to
    it, because it is written to disk while it arrives."""
    max_unfinished_batches: Annotated[int, Field(ge=0), Allowed("0 or more")] = 100
    """Batches of one API key (without keys: of all clients) that have not ended. Another one gets 429. 0: no limit."""
    batch_retention_days: PositiveNumber | None = None
    """Ended batches, with their input and result files, are deleted after this many days. Unset: batches stay in the list, and
    files are deleted when they expire, after 30 days at most."""

    def require_driver(self) -> None:
        """Raise SettingsError if the driver of the database is not installed."""
        if self.batches and self.database_url is not None and find_spec("psycopg") is None:
            raise SettingsError(
                f"{PREFIX}DATABASE_URL requires the driver of PostgreSQL. Install it with: pip install "
                "'emb-model-provider[postgresql]'"
            )


class ServerSettings(SettingsGroup, title="Server"):
    """Where the service listens, and which clients it answers."""

    host: Annotated[str, Allowed("names or addresses separated by commas")] = "localhost"
    """Names or addresses to listen on, separated by commas. `*` or `::`: all addresses of this machine, IPv4 and IPv6;
    `0.0.0.0`: all IPv4 addresses. The container sets 0.0.0.0."""
    port: Annotated[int, Field(ge=1, le=65_535), Allowed("1 to 65535")] = 9000
    """Port to listen on."""
    api_keys: SecretStr | None = None
    """Keys, separated by commas. If set, every route requires one of them, except those for monitoring and
    documentation: as a Bearer token, or in the header `api-key` or `x-api-key`. Never shown."""
    api_key_names: Annotated[Names, Allowed("names separated by commas, one for each key")] | None = None
    """Names of the keys of API_KEYS, in their order, for `/metrics` and QUOTAS. Unset: key-1, key-2, and so on."""
    quotas: Annotated[dict[str, Count], Allowed('JSON from names of keys to tokens, like {"search": 100000}')] = {}
    """JSON object from the name of a key to the tokens that its requests may have per minute; `*` is the quota of each other
    key. A key whose tokens are used up gets 429 with `Retry-After`. Names: API_KEY_NAMES. Unset: no quotas."""
    admin_api_keys: SecretStr | None = None
    """Keys, separated by commas, for routes that change something (`/api/…`). Unset: those routes answer only direct
    clients on the same machine, not through a proxy and not from a page of another site. Never shown."""
    allowed_hosts: Annotated[Names, Allowed("host names separated by commas")] | None = None
    """Accepted Host header values, separated by commas; `*` accepts any. Unset: the names and addresses of loopback if
    the service listens only on loopback, else any."""
    cors_origins: Annotated[Names, Allowed("origins separated by commas")] = ()
    """Origins of web pages that may call the API, separated by commas; `*` accepts any. Unset: none. Requests of other
    pages are rejected, except with a valid key."""
    console: bool = True
    """Serve the web console at `/console`. The rules of ADMIN_API_KEYS apply to it: docs/console.md. false: it does not
    exist."""

    @property
    def accepted_keys(self) -> tuple[str, ...]:
        return _split_keys(self.api_keys)

    @property
    def key_names(self) -> tuple[str, ...]:
        """The name of each of the accepted keys."""
        return self.api_key_names or tuple(f"key-{number}" for number, _ in enumerate(self.accepted_keys, 1))

    @model_validator(mode="after")
    def _check_key_names(self) -> Self:
        keys, names = self.accepted_keys, self.key_names
        if len(names) != len(keys) or len(set(names)) != len(names):
            raise SettingsError(
                f"{PREFIX}API_KEY_NAMES={','.join(names)}: must be different names, one for each of the {len(keys)} keys of "
                f"{PREFIX}API_KEYS."
            )
        if unknown := sorted(self.quotas.keys() - {*names, ANY}):
            known = f"The names are {', '.join(names)}." if names else f"{PREFIX}API_KEYS is not set."
            raise SettingsError(f"{PREFIX}QUOTAS: {', '.join(unknown)} is not the name of a key. {known}")
        if self.quotas and not keys:
            raise SettingsError(f"{PREFIX}QUOTAS: set {PREFIX}API_KEYS, because quotas apply to keys.")
        return self

    @property
    def accepted_admin_keys(self) -> tuple[str, ...]:
        """Keys of the management routes; without any, only a direct local client may use those routes."""
        return _split_keys(self.admin_api_keys)

    @model_validator(mode="after")
    def _check_hosts(self) -> Self:
        if not self.hosts:
            raise SettingsError(f"{PREFIX}HOST={self.host}: must be names or addresses separated by commas.")
        for host in self.allowed_hosts or ():
            if host != ANY and parse_host(_bracketed(host)) is None:
                raise SettingsError(
                    f"{PREFIX}ALLOWED_HOSTS={host}: must be host names separated by commas, like embeddings.example.com."
                )
        return self

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names and addresses to listen on; only `ANY` for all addresses."""
        hosts = [host.strip().removeprefix("[").removesuffix("]") for host in self.host.split(",") if host.strip()]
        return (ANY,) if {ANY, "::"} & set(hosts) else tuple(dict.fromkeys(hosts))

    @property
    def local_url(self) -> str:
        """The URL for clients on this machine, under a loopback address if the service listens on one."""
        host = next(filter(is_loopback_host, self.hosts), self.hosts[0])
        host = "127.0.0.1" if host in (ANY, "0.0.0.0") else host  # noqa: S104 - not listened on
        return f"http://{_bracketed(host)}:{self.port}"

    @property
    def checks_hosts(self) -> bool:
        """Whether requests with another host than `accepted_hosts` are rejected."""
        return self.is_on_loopback if self.allowed_hosts is None else ANY not in self.allowed_hosts

    @property
    def is_on_loopback(self) -> bool:
        """Whether only clients on this machine can connect."""
        return all(host != "0.0.0.0" and is_loopback_host(host) for host in self.hosts)  # noqa: S104 - likewise

    @property
    def accepted_hosts(self) -> frozenset[str]:
        """The hosts of requests that are answered, without ports; none stands for the spellings of this machine."""
        return frozenset(filter(None, (parse_host(_bracketed(host)) for host in self.allowed_hosts or ())))


class LifecycleSettings(SettingsGroup, title="Faults and shutdown"):
    """How the service notices faults, recovers from them, and shuts down."""

    watchdog_s: PositiveNumber = 60
    """A batch that runs longer than this many seconds (or ten times as long as its tokens should take, if that is more)
    counts as hung, and `/ready` reports it. While every stream of a model hangs, the model accepts no requests."""
    supervise: bool = False
    """Run the service as a child of a small process that keeps the port open and restarts the service if it crashes or
    hangs. For bare machines; in a container the restart policy does this."""
    workers: Count = 1
    """Number of processes that answer requests behind the same port, each with its share of the processors and of the limits,
    and with each model in memory. More than 1 implies SUPERVISE. For machines with 16 or more processors: docs/deploy.md says
    when."""
    shutdown_grace_s: NonNegativeNumber = 60
    """How many seconds accepted requests have to finish after SIGTERM or Ctrl-C. A second signal ends the service at
    once."""


class LogSettings(SettingsGroup, title="Logs"):
    """Where log lines go, and in which format."""

    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], Uppered] = "INFO"
    """Lowest level of log lines to write."""
    log_format: Annotated[Literal["auto", "text", "json"], Lowered] = "auto"
    """Format of log lines. auto: text on a terminal, else json."""
    log_to_file: bool = True
    """Also write `emb_model_provider.log` in LOG_DIR, rotated by size and age."""
    log_dir: Directory = Path("logs")
    """Directory of the log file. The default is relative to the working directory; if that is `/`, as in services of
    systemd, it is the user's log directory (`~/.local/state/emb_model_provider/log`)."""

    @property
    def directory(self) -> Path:
        """LOG_DIR, or its default for the working directory."""
        if "log_dir" in self.model_fields_set or Path.cwd() != Path(Path.cwd().anchor):
            return self.log_dir
        try:
            return platformdirs.user_log_path("emb_model_provider", appauthor=False)
        except RuntimeError as error:
            raise SettingsError(
                f"This user has no home directory for log files. Set {PREFIX}LOG_DIR or HOME, or {PREFIX}LOG_TO_FILE=false."
            ) from error


def _reveal(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret is not None else None


def _bracketed(host: str) -> str:
    """Return a host as it is written in a URL or a Host header."""
    return f"[{host}]" if host.count(":") > 1 and not host.startswith("[") else host


def _split_keys(secret: SecretStr | None) -> tuple[str, ...]:
    keys = _reveal(secret) or ""
    return tuple(key.strip() for key in keys.split(",") if key.strip())
