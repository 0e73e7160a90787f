"""Requests and responses of the management routes. Times are ISO 8601 in UTC, sizes are bytes."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from emb_model_provider.management.types import CachedModelRecord, Details, DownloadRecord, FidelityObject, Verification
from emb_model_provider.model_spec import Precision, Source
from emb_model_provider.settings import Lowered

Name = Annotated[str, Field(min_length=1, max_length=300)]
Seconds = Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)]


class _Query(BaseModel):
    # A misspelled parameter must not be ignored: `dryrun=true` would remove models.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelQuery(_Query):
    """A model of any hub, or of the settings."""

    model_name: Name = Field(
        description="An alias or a name of the settings, or a repository's id (`owner/name`), or the URL of its page on the "
        "hub. A directory only if the settings name it."
    )
    source: Annotated[Source, Lowered] | None = Field(
        None, description="The hub: auto, modelscope or huggingface. Default: that of the settings."
    )
    revision: Name | None = Field(None, description="Branch, tag or commit. Default: the hub's default branch.")
    precision: Annotated[Precision, Lowered] | None = Field(
        None,
        description="Precision of the computation: auto, fp32, fp16, bf16, int8 or int4. Default: that of the settings.",
    )


class LoadQuery(ModelQuery):
    """A model to load."""

    alias: Name | None = Field(None, description="Name for requests. Default: that of the settings, or `model_name`.")
    keep: bool = Field(
        False, description="Serve the model again after a restart of the service, until it is forgotten."
    )
    wait: bool = Field(True, description="false: respond with 202 at once, while the model is being loaded.")


class UnloadQuery(_Query):
    """A served model to unload."""

    model_name: Name = Field(description="An alias, a model's id, or the unique last part of an id.")
    forget: bool = Field(
        False, description="Also stop serving the model, also after a restart. Only if it is not in the settings."
    )


class DownloadQuery(ModelQuery):
    """A model to download."""

    force: bool = Field(False, description="Ask the hub even if the model is on disk, and download what changed.")
    compile: bool = Field(
        True,
        description="Also compile the model at `precision`, so that it loads within seconds. false: download it only.",
    )


class TransferQuery(_Query):
    """A repository to copy from one hub to another."""

    model_name: Name = Field(
        description="`owner/name` on Hugging Face, or `ms:owner/name` on ModelScope; `@REV` at its end is a branch, tag or "
        "commit."
    )
    destination: Name = Field(description="`owner/name` on the other hub, or with `hf:` or `ms:` on this one.")
    license: Name | None = Field(
        None, description="License of the repository if it is created. Default: that of the source."
    )
    commit_message: Name | None = Field(None, description="Default: `Mirror of owner/name@commit`.")
    i_have_permission: bool = Field(
        False, description="Confirms that a gated, non-commercial or private repository may be copied."
    )
    overwrite_card: bool = Field(
        False,
        description="Replace the front matter of README.md and configuration.json of a destination that exists already.",
    )


class ListQuery(_Query):
    """Which models on disk are listed."""

    all: bool = Field(False, description="Include models that other programs left in the hubs' caches.")


class CachedQuery(_Query):
    """One hub or one revision of a model on disk."""

    source: Annotated[Source, Lowered] | None = Field(None, description="Only from this hub.")
    revision: Name | None = Field(None, description="Only this revision, as requested or as resolved.")


class RemoveAllQuery(_Query):
    """How models are removed from disk."""

    wait_s: Seconds = Field(0, description="How many seconds to wait for models that are in use.")
    unload: bool = Field(
        False,
        description="Unload served models of these files first, after their current requests. The next request for a "
        "model downloads it again; if it is not in the settings, it is no longer served.",
    )
    dry_run: bool = Field(False, description="Remove nothing, and return what would be removed.")


class RemoveQuery(CachedQuery, RemoveAllQuery):
    """Which revisions of a model are removed from disk, and how."""


class _Response(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ServedModel(_Response):
    """A model that is served, loaded or not. What only loading determines is null until then."""

    alias: str
    more_aliases: list[str] = Field(description="Further aliases of the model.")
    model_name: str = Field(description="The repository's id or directory.")
    source: str = Field(description="The hub it came from; before it is loaded, the requested hub.")
    revision: str | None
    path: str | None = Field(description="The directory of its files.")
    configured: bool = Field(description="Whether it is in the settings.")
    kept: bool = Field(description="Whether it was added with `keep`, so that it is served again after a restart.")
    preload: bool = Field(description="Whether it is loaded at startup.")
    state: str = Field(description="unloaded, downloading, compiling, loading, ready, hung, failed or unloading.")
    error: str | None = Field(description="Why it failed, hangs, is being reloaded, or takes long to load.")
    progress: str | None = Field(description="How far its download or its compilation has come.")
    unloaded_because: str | None
    loaded_at: datetime | None
    last_used: datetime | None = Field(description="Time of the last answered request.")
    requests_served: int = Field(description="Since the service started.")
    requests_per_s: float = Field(description="Over the last 60 seconds.")
    p95_s: float | None = Field(description="95th percentile of the latency over the last 60 seconds, in seconds.")
    waiting_inputs: int
    waiting_tokens: int
    memory_bytes: int | None = Field(description="Memory that it takes, as far as it is known.")
    restarts: int = Field(description="How often it was reloaded after a crash.")
    asked_precision: str
    precision: str | None
    device: str | None
    backend: str | None
    kind: str | None
    tasks: list[str] | None
    dimensions: int | None
    max_input_tokens: int | None
    notes: list[str] | None = Field(description="Notes on how it was loaded.")
    fidelity: FidelityObject | None


class Process(_Response):
    """The process of the service and its memory."""

    pid: int
    version: str
    resident_bytes: int | None = Field(description="Resident memory of the process; null if it is unknown.")
    models_memory_bytes: int = Field(description="Memory of all loaded models.")
    memory_limit_bytes: int | None = Field(description="EMB_PROVIDER_MODEL_MEMORY_LIMIT; null: no limit.")
    max_loaded_models: int | None = Field(description="EMB_PROVIDER_MAX_LOADED_MODELS; null: no limit.")


class ServedModels(_Response):
    """The served models and the process that serves them."""

    models: list[ServedModel] = Field(description="In the order of the settings, then in that of their addition.")
    process: Process


class DownloadJob(DownloadRecord):
    """A download, or a transfer to another hub, that runs in the background."""

    url: str = Field(description="Path of this job. `{url}/events` streams its events; DELETE cancels it.")


class DownloadJobList(_Response):
    """The downloads and transfers since the service started."""

    jobs: list[DownloadJob] = Field(
        description="The latest first. The last 100 ended jobs are kept until the service stops."
    )


class CachedModel(CachedModelRecord):
    """A model on disk, at one revision, from one hub."""

    served_as: list[str] = Field(description="Aliases that this service has loaded from its files.")


class CachedModels(_Response):
    """The models on disk."""

    models: list[CachedModel]
    total_size: int = Field(description="Files that two models share are counted once.")


class CachedModelDetails(CachedModel):
    """A model on disk with what its files say about it."""

    details: Details


class CachedModelsDetails(_Response):
    """The revisions of a model on disk."""

    models: list[CachedModelDetails]


class VerifiedModel(Verification, CachedModel):
    """A model on disk whose files were hashed again."""


class VerifiedModels(_Response):
    """The revisions of a model whose files were hashed again."""

    ok: bool = Field(description="Whether all of them are unchanged.")
    models: list[VerifiedModel]


class KeptModel(CachedModel):
    """A model that was not removed."""

    reason: str


class Removed(_Response):
    """The result of a removal."""

    dry_run: bool = Field(description="true: nothing was removed, and the other fields are what would be.")
    models: list[CachedModel] = Field(description="The removed models, as they were before.")
    artifacts: list[str] = Field(description="Keys of the compiled forms that were removed with them.")
    freed: int
    kept: list[KeptModel] = Field(description="Models that are in use.")
    unloaded: list[str] = Field(description="Aliases that were unloaded before the removal.")
