"""The wire's shapes of the routes that manage models. Times are ISO 8601 in UTC, sizes bytes."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from emb_model_provider.management.types import (
    CachedModelRecord,
    Details,
    DownloadRecord,
    FidelityObject,
    Verification,
)
from emb_model_provider.model_spec import Precision, Source
from emb_model_provider.settings import Lowered

Name = Annotated[str, Field(min_length=1, max_length=300)]
Seconds = Annotated[float, Field(ge=0, le=3600, allow_inf_nan=False)]

# --- what is asked ------------------------------------------------------------------------------------


class _Query(BaseModel):
    # A misspelt parameter must not be taken for an absent one: `dryrun=true` would delete.
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelQuery(_Query):
    """Which model is meant, of those there are anywhere."""

    model_name: Name = Field(
        description="An alias or a name of the settings, or a repository's id (`owner/name`). A directory only "
        "where the settings name it."
    )
    source: Annotated[Source, Lowered] | None = Field(
        None, description="The hub: auto, modelscope or huggingface. Absent: as the settings say."
    )
    revision: Name | None = Field(
        None, description="Branch, tag or commit. Absent: the hub's default branch."
    )
    precision: Annotated[Precision, Lowered] | None = Field(
        None,
        description="How it computes: auto, fp32, fp16, bf16, int8 or int4. Absent: as the settings say.",
    )


class LoadQuery(ModelQuery):
    alias: Name | None = Field(
        None,
        description="The name that requests will use. Absent: the alias of the settings, or `model_name`.",
    )
    wait: bool = Field(True, description="false: answer with 202 at once, and let it load.")


class UnloadQuery(_Query):
    model_name: Name = Field(description="An alias, a model's id, or the unique last part of one.")
    forget: bool = Field(
        False, description="Serve it no more, either. Only for models that are not in the settings."
    )


class DownloadQuery(ModelQuery):
    force: bool = Field(False, description="Ask the hub again though it is here, and fetch what differs.")
    compile: bool = Field(
        False, description="Compile it too (at `precision`), so that its first load is quick."
    )


class ListQuery(_Query):
    all: bool = Field(False, description="Also what other programs put into the hubs' caches.")


class CachedQuery(_Query):
    """Narrows an id to one hub or one revision."""

    source: Annotated[Source, Lowered] | None = Field(None, description="Only from this hub.")
    revision: Name | None = Field(None, description="Only this revision, as it was asked for or as resolved.")


class RemoveAllQuery(_Query):
    wait_s: Seconds = Field(0, description="How many seconds to wait for what is in use.")
    unload: bool = Field(
        False,
        description="Unload served models first whose files these are, once their requests are answered. The next "
        "request for one fetches it again, unless it is not in the settings: then it is served no more.",
    )
    dry_run: bool = Field(False, description="Only tell what would be removed.")


class RemoveQuery(CachedQuery, RemoveAllQuery):
    pass


# --- what is answered: models in memory ---------------------------------------------------------------


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ServedModel(_Answer):
    """A model that is served, loaded or not. What loading finds out is null until then."""

    alias: str
    model_name: str = Field(description="The repository's id or directory.")
    source: str = Field(description="The hub it came from; before loading, the one that was asked for.")
    revision: str | None
    path: str | None = Field(description="The directory of its files.")
    configured: bool = Field(description="Whether it is in the settings.")
    preload: bool = Field(description="Whether it is loaded at the start.")
    state: str = Field(
        description="unloaded, downloading, compiling, loading, ready, hung, failed or unloading."
    )
    error: str | None = Field(description="Why it failed, hangs, is loaded anew or takes long to load.")
    unloaded_because: str | None
    loaded_at: datetime | None
    last_used: datetime | None = Field(description="When a request was last answered.")
    requests_served: int = Field(description="Since the service started.")
    requests_per_s: float = Field(description="Over the last 60 s.")
    p95_s: float | None = Field(
        description="95th percentile of a request's time, seconds, over the last 60 s."
    )
    waiting_inputs: int
    waiting_tokens: int
    memory_bytes: int | None = Field(description="What it takes in memory, as far as that is known.")
    restarts: int = Field(description="How often it broke down and was loaded anew.")
    asked_precision: str
    precision: str | None
    device: str | None
    backend: str | None
    dimensions: int | None
    max_input_tokens: int | None
    notes: list[str] | None = Field(description="What to know of how it was loaded.")
    fidelity: FidelityObject | None


class Process(_Answer):
    pid: int
    version: str
    resident_bytes: int | None = Field(description="All of the process; null where the system does not tell.")
    models_memory_bytes: int = Field(description="Of all loaded models together.")
    memory_limit_bytes: int | None = Field(description="EMB_PROVIDER_MODEL_MEMORY_LIMIT; null: none.")
    max_loaded_models: int | None = Field(description="EMB_PROVIDER_MAX_LOADED_MODELS; null: none.")


class ServedModels(_Answer):
    models: list[ServedModel] = Field(description="In the order of the settings, then as they were added.")
    process: Process


# --- downloads ----------------------------------------------------------------------------------------


class DownloadJob(DownloadRecord):
    url: str = Field(description="Of this job. `/events` below it streams its events; DELETE cancels it.")


class DownloadJobList(_Answer):
    jobs: list[DownloadJob] = Field(
        description="The latest first. Of those that ended, the last 100 are remembered until the service stops."
    )


# --- models on disk -----------------------------------------------------------------------------------


class CachedModel(CachedModelRecord):
    served_as: list[str] = Field(description="Aliases of this service that are loaded from it.")


class CachedModels(_Answer):
    models: list[CachedModel]
    total_size: int = Field(description="Files that two models share count once.")


class CachedModelDetails(CachedModel):
    details: Details


class CachedModelsDetails(_Answer):
    models: list[CachedModelDetails]


class VerifiedModel(Verification):
    served_as: list[str] = Field(description="Aliases of this service that are loaded from it.")


class VerifiedModels(_Answer):
    ok: bool = Field(description="Whether all of them are.")
    models: list[VerifiedModel]


class KeptModel(CachedModel):
    reason: str


class Removed(_Answer):
    dry_run: bool = Field(description="true: nothing was removed; this is what would be.")
    models: list[CachedModel] = Field(description="As they were.")
    artifacts: list[str] = Field(description="Keys of compiled models that went with them.")
    freed: int
    kept: list[KeptModel] = Field(description="What is in use.")
    unloaded: list[str] = Field(description="Aliases that were unloaded for it.")
