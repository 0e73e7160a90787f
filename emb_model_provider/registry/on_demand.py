"""Serves models on disk by their names, and says of a model that is not served what is known of it."""

from __future__ import annotations

import asyncio
import shlex
from contextlib import suppress
from typing import TYPE_CHECKING

from emb_model_provider.errors import ModelNotReadyError, NotLoadedHereError, ProviderError
from emb_model_provider.formatting import format_estimate, format_size
from emb_model_provider.model_resolver import NameIndex, ResolvedName
from emb_model_provider.registry.model_entry import ModelStatus, State

if TYPE_CHECKING:
    from emb_model_provider.management.cache_index import CacheIndex, CacheView, ServableModel
    from emb_model_provider.management.downloads import DownloadJobs
    from emb_model_provider.management.types import DownloadRecord
    from emb_model_provider.registry.registry import Registry

_RETRY_AFTER_S = 10.0
_MAX_AGE_S = 1.0


class OnDemandModels:
    """The served models, and those on disk that are served when a request names them. Used on one event loop."""

    def __init__(self, registry: Registry, index: CacheIndex, jobs: DownloadJobs, *, serves_cached: bool) -> None:
        """Create it; without `serves_cached`, models on disk are only named in errors."""
        self._registry = registry
        self._index = index
        self._jobs = jobs
        self._serves_cached = serves_cached

    async def resolve(self, name: str) -> ResolvedName:
        """Return what the name in a request for embeddings refers to; a model on disk is served from now on.

        Raises:
            ModelNotFoundError: It refers to no model that may be served. The message says if it is on disk.
            ModelNotReadyError: The model is being downloaded.
        """
        registry = self._registry
        found = registry.find(name)
        if found is not None and not registry.needs_files(found.alias):
            return found
        view = await self._view()
        if found is not None:
            if found.alias in view:
                return found
            with suppress(ProviderError):  # another request has removed it
                await registry.remove(found.alias)  # its files were removed
        model = view.find(name)
        if model is not None and self._serves_cached:
            registry.add(model.spec, on_demand=True)
        elif not registry.answers_unknown:
            raise self._explain(name, model, view)
        return registry.resolve(name)

    async def statuses(self) -> list[ModelStatus]:
        """Return the status of all models that requests can name: those of the registry, then those on disk."""
        statuses = self._registry.statuses()
        if not self._serves_cached:
            return statuses
        listed = [model for model in (await self._view()).models if not model.is_dependency]
        return statuses + [_status(model) for model in listed if self._registry.find(model.spec.alias) is None]

    async def status(self, name: str) -> tuple[ModelStatus, ResolvedName]:
        """Return the status of the model that a name refers to, without serving it if it is only on disk."""
        registry = self._registry
        found = registry.find(name)
        if found is None:
            view = await self._view()
            model = view.find(name)
            if model is not None and self._serves_cached:
                return _status(model), ResolvedName(model.spec.alias, model.spec.alias)
            if not registry.answers_unknown:
                raise self._explain(name, model, view)
            found = registry.resolve(name)
        return registry.status(found.alias), found

    async def _view(self) -> CacheView:
        # If the default model answers unknown names, these are in the requests of clients that always send the same name.
        view = self._index.recent_view(_MAX_AGE_S if self._registry.answers_unknown else 0.0)
        return await asyncio.to_thread(self._index.view) if view is None else view

    def _explain(self, name: str, model: ServableModel | None, view: CacheView) -> ProviderError:
        """Return the error for a name that is not served."""
        pull = f"`emb-provider pull {shlex.quote(name[:200])}`"
        if (job := self._running_download(name)) is not None:
            return self._downloading(name, *_describe(job))
        entry = view.find_incomplete(name)
        if model is None and entry is not None and entry.in_use:
            return self._downloading(
                name, f"{format_size(entry.files_size)} so far, by another process", _RETRY_AFTER_S
            )
        if model is not None:
            alias = model.spec.alias
            return self._registry.not_found(
                name,
                f"is on the disk of this machine, and it is not served. To serve it, run `emb-provider load {alias}` or send "
                f"POST /api/models/load?model_name={alias}; EMB_PROVIDER_SERVE_CACHED=true serves all models on disk",
            )
        if entry is not None:
            return self._registry.not_found(
                name, f"is on disk in part, because its download was interrupted. {pull} continues it"
            )
        return self._registry.not_found(name)

    def _downloading(self, name: str, progress: str, retry_after_s: float) -> ProviderError:
        if not self._serves_cached:  # so that trying again does not help
            return self._registry.not_found(name, f"is being downloaded ({progress}), and is not served")
        return ModelNotReadyError(
            f"The model `{name[:200]}` is being downloaded: {progress}. Try again later.", retry_after_s=retry_after_s
        )

    def _running_download(self, name: str) -> DownloadRecord | None:
        running = {spec.alias: (spec, record) for spec, record in self._jobs.running_downloads()}
        names = NameIndex(spec for spec, _ in running.values())
        found = names.find(name) or names.find_similar(name)
        return running[found.alias][1] if found is not None else None


class FollowedModels(OnDemandModels):
    """The models of a worker that follows the primary one. It answers requests for those that it has loaded."""

    async def resolve(self, name: str) -> ResolvedName:
        """Return what the name in a request refers to.

        Raises:
            NotLoadedHereError: The primary worker answers this request.
        """
        found = self._registry.find_loaded(name)
        is_default = self._registry.answers_unknown and not self._serves_cached
        if found is None and is_default and self._registry.find(name) is None:
            found = self._registry.find_loaded(self._registry.default_alias)
        if found is None:
            raise NotLoadedHereError
        return found


def _status(model: ServableModel) -> ModelStatus:
    return ModelStatus(
        spec=model.spec,
        state=State.UNLOADED,
        preload=False,
        required=False,
        created=model.fetched,
        error=None,
        restarts=0,
        snapshot=model.snapshot,
        description=None,
        waiting_inputs=0,
        waiting_tokens=0,
        configured=False,
    )


def _describe(job: DownloadRecord) -> tuple[str, float]:
    """Return the progress of a download as text, and after how many seconds to ask again."""
    if job.state == "queued":
        return "it waits for other downloads", _RETRY_AFTER_S
    if not job.total_bytes or job.phase not in ("download", "verify"):
        return f"{job.phase or 'resolve'}", _RETRY_AFTER_S
    share = f"{job.done_bytes * 100 // job.total_bytes} %"
    text = f"{job.phase} {format_size(job.done_bytes)} of {format_size(job.total_bytes)} ({share})"
    if not job.bytes_per_s:
        return text, _RETRY_AFTER_S
    left_s = (job.total_bytes - job.done_bytes) / job.bytes_per_s
    return f"{text}, about {format_estimate(left_s)} left", left_s
