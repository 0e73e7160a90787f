"""The served models of one service: names, leases, loading and unloading, adding and removing."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from emb_model_provider.errors import (
    ModelInUseError,
    ModelNotFoundError,
    ModelNotReadyError,
    NotAllowedError,
    ProviderError,
)
from emb_model_provider.model_resolver import NameIndex, ResolvedName
from emb_model_provider.registry.lifecycle import Lifecycle, Watchdog
from emb_model_provider.registry.model_entry import ModelEntry, ModelStatus, State

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.registry.lifecycle import RegistryConfig
    from emb_model_provider.registry.model_entry import LoadedModel, PublishedModel
    from emb_model_provider.serving.engine import Engine
    from emb_model_provider.settings import ServedModels

_LOADING_RETRY_AFTER_S = 5.0
_TOKENIZER_THREADS = 2


@dataclass(slots=True)
class Lease:
    """A request's use of a loaded model. `async with` it once to get the engine; the model is loaded if necessary."""

    _entry: ModelEntry
    _ensure_loaded: Callable[[ModelEntry], Awaitable[LoadedModel]]
    """Loads the model and increments its reference count."""
    _loaded_model: LoadedModel = field(init=False)
    _began: float = field(init=False)

    async def __aenter__(self) -> Engine:
        """Return the engine; raise ModelNotReadyError if the model cannot be loaded, or not within LOAD_WAIT_S."""
        loaded_model = self._entry.loaded_model
        if loaded_model is None or loaded_model.engine is None:
            loaded_model = await self._ensure_loaded(self._entry)
        else:
            loaded_model.ref_count += 1
        self._loaded_model = loaded_model
        self._began = time.monotonic()
        engine = loaded_model.engine
        if engine is None:
            raise RuntimeError("the load returned without an engine")
        return engine

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._loaded_model.release_ref()
        self._entry.stats.record(self._began, time.monotonic(), answered=kind is None)


class Registry:
    """The models of one service. Used on one event loop."""

    def __init__(self, models: ServedModels, manager: ModelManager, config: RegistryConfig) -> None:
        memory = config.memory
        self._load_wait_s = config.limits.request_timeout_s if memory.load_wait_s is None else memory.load_wait_s
        self._timings = config.timings
        self._entries = {
            spec.alias: ModelEntry(
                spec=spec,
                preload=spec.alias in models.preload,
                required=spec.alias in (models.preload if models.required is None else models.required),
                configured=True,
                slow_load_s=self._timings.slow_load_s,
            )
            for spec in models.specs
        }
        self.default_alias = models.specs[0].alias
        """Alias of the model that serves requests without a model name."""
        self.answers_unknown = models.answers_unknown
        """Whether the default model answers requests for unknown models."""
        self._names = self._build_index()
        self._executor = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="tokenize")
        self._lifecycle = Lifecycle(manager, config, self._executor)
        self._wait_for_workers = config.wait_for_workers
        self._leaving: set[asyncio.Task[None]] = set()
        """Unloads that another worker has caused, and that have not ended."""
        self._watchdog = Watchdog(self._entries.values, self._lifecycle, config)

    # --- names and states -----------------------------------------------------------------------------

    def alias_of(self, name: str) -> str:
        """Return the first alias of the model that a name refers to: an alias, an id, or a unique last part of one.

        All methods with a name raise ModelNotFoundError if it refers to no served model, or to several.
        """
        found = self._names.find(name)
        if found is None:
            raise self.not_found(name)
        return found.alias

    def resolve(self, name: str) -> ResolvedName:
        """Return what the name in a request for embeddings refers to.

        These requests, unlike those that manage models, may also use similar names (`NameIndex.find_similar`), and any
        name if the settings say that the default model answers requests for unknown models.
        """
        found = self.find(name)
        if found is None and self.answers_unknown:
            found = self._names.find(self.default_alias)
        if found is None:
            raise self.not_found(name)
        return found

    def find(self, name: str) -> ResolvedName | None:
        """Return what the name in a request for embeddings refers to, or None if it is unknown or ambiguous."""
        found = self._names.find(name) or self._names.find_similar(name)
        return replace(found, needs_prompts=False) if found is not None and self.answers_unknown else found

    def needs_files(self, alias: str) -> bool:
        """Return whether a model is served because it is on disk, and its next request will read its files."""
        entry = self._entries[alias]
        return entry.on_demand and entry.loaded_model is None

    def status(self, name: str) -> ModelStatus:
        return self._entries[self.alias_of(name)].status()

    def statuses(self) -> list[ModelStatus]:
        """Return the status of all models: those of the settings in their order, then the added ones."""
        return [entry.status() for entry in self._entries.values()]

    # --- serving --------------------------------------------------------------------------------------

    def lease(self, name: str) -> Lease:
        """Return a lease on a model: `async with registry.lease(name) as engine`.

        A model that is not in memory is loaded first, once for all requests that wait for it. A model is not unloaded
        during a lease.
        """
        return Lease(self._entries[self.alias_of(name)], self._ensure_loaded)

    async def preload(self) -> bool:
        """Load the models that are to be loaded at startup; return whether a model of the registry has not failed."""
        loads = [self._lifecycle.begin_loading(entry).loading for entry in self._entries.values() if entry.preload]
        if loads:
            await asyncio.wait(loads)
        return any(entry.state is not State.FAILED for entry in self._entries.values())

    async def watch(self, on_hung: Callable[[str], None] | None = None) -> None:
        """Watch all models until cancelled: report those that hang, and unload those that are idle.

        `on_hung` is called with the reason `watchdog_s` seconds after a hang was reported, because a computation that
        does not end can only be ended with its process.
        """
        await self._watchdog.run(on_hung)

    # --- managing -------------------------------------------------------------------------------------

    async def load(self, name: str) -> ModelStatus:
        """Load a model, however long it takes, and return its status. A model that failed is loaded again at once.

        Raises:
            HubError, LoadError: The model cannot be loaded.
            ModelNotReadyError: The service is shutting down, or the model was removed.
        """
        entry = self._entries[self.alias_of(name)]
        loaded_model = await self._lifecycle.ensure_loaded(entry)
        loaded_model.release_ref()
        return entry.status()

    async def unload(self, name: str, reason: str = "asked to") -> ModelStatus:
        """Unload a model after its requests are answered, and return its status.

        If the model is being loaded, it is unloaded after the load. The next request loads it again. The reason must be
        one of few fixed texts, because it is a label of a metric.
        """
        entry = self._entries[self.alias_of(name)]
        await self._lifecycle.unload(entry, reason)
        await self._wait_for_workers()
        return entry.status()

    def add(self, spec: ModelSpec, *, on_demand: bool = False) -> str:
        """Serve another model, which is loaded at its first request, and return its alias.

        With `on_demand` it is served from the files on disk, and is never downloaded.

        Raises:
            ModelInUseError: Another model has this alias.
        """
        entry = self._entries.get(spec.alias)
        if entry is None:
            self._entries[spec.alias] = ModelEntry(
                spec=spec, on_demand=on_demand, slow_load_s=self._timings.slow_load_s
            )
            self._names = self._build_index()
        elif entry.spec != spec:
            raise ModelInUseError(
                f"The alias `{spec.alias}` is taken by {entry.spec.name}. Choose another alias for this model."
            )
        return spec.alias

    async def remove(self, alias: str) -> ModelStatus:
        """Stop serving a model that was added at run time, and unload it after its requests are answered.

        Names other than the alias are not accepted, because they may refer to another model meanwhile.

        Raises:
            ModelNotFoundError: No model has this alias.
            NotAllowedError: The model is in the settings.
        """
        entry = self._entries.get(alias)
        if entry is None:
            raise self.not_found(alias)
        if entry.configured:
            raise NotAllowedError(
                f"`{alias}` is in the settings and cannot be removed while the service runs. Unload it without "
                "removing it (forget=false), or remove it from EMB_PROVIDER_MODEL_MAPPING and restart the service."
            )
        del self._entries[alias]
        self._names = self._build_index()
        entry.removed = True
        await self._lifecycle.unload(entry, "forgotten")
        await self._wait_for_workers()
        return entry.status()

    # --- several workers ------------------------------------------------------------------------------

    def published(self) -> tuple[PublishedModel, ...]:
        """Return what the other workers have to know of the models."""
        return tuple(entry.published() for entry in self._entries.values())

    def follow(self, models: Sequence[PublishedModel]) -> None:
        """Serve the models that the primary worker has published, and no others; begin to load and to unload them.

        Names, and which models may be used, are those of the primary when this returns. Call it regularly with the same
        models: it tries a failed load again after a while.
        """
        entries = {}
        for model in models:
            entry = self._entries.get(model.spec.alias)
            if entry is None or entry.spec != model.spec:
                entry = ModelEntry(spec=model.spec, slow_load_s=self._timings.slow_load_s)
            entry.configured, entry.on_demand = model.configured, model.on_demand
            entries[model.spec.alias] = entry
        for entry in self._entries.values():
            if entries.get(entry.spec.alias) is not entry:
                entry.removed = True
                self._leave(entry)
        has_changed = entries.keys() != self._entries.keys() or any(
            entries[alias] is not entry for alias, entry in self._entries.items()
        )
        self._entries = entries
        if has_changed:
            self._names = self._build_index()
        for model in models:
            self._follow_load(entries[model.spec.alias], model)

    def _follow_load(self, entry: ModelEntry, model: PublishedModel) -> None:
        if model.use == "unload" or (model.use == "load" and entry.given_snapshot not in (None, model.snapshot)):
            entry.given_snapshot = None
            self._leave(entry)
        if model.use != "load" or entry.is_unloading:
            return
        entry.given_snapshot, entry.may_serve = model.snapshot, True
        has_failed = entry.state is State.FAILED
        if not has_failed or time.monotonic() > entry.failed_at + self._timings.retry_after_failure_s:
            self._lifecycle.begin_loading(entry)

    def _leave(self, entry: ModelEntry) -> None:
        entry.may_serve = False
        if entry.loaded_model is not None and not entry.is_unloading:
            task = self._lifecycle.begin_unloading(entry, "unloaded by worker 0")
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    @property
    def has_left(self) -> bool:
        """Whether all models that the primary worker does not have are unloaded, and their files free."""
        return not self._leaving

    @property
    def is_following(self) -> bool:
        """Whether a model is being loaded because the primary worker has it."""
        return any(
            entry.given_snapshot is not None and entry.loaded_model is not None and entry.engine is None
            for entry in self._entries.values()
        )

    def find_loaded(self, name: str) -> ResolvedName | None:
        """Return what a name refers to if this worker can answer requests for it now."""
        found = self.find(name)
        if found is None:
            return None
        entry = self._entries[found.alias]
        is_loaded = entry.may_serve and entry.state is State.READY and entry.engine is not None
        return found if is_loaded else None

    def take_stats(self) -> Mapping[str, tuple[int, float | None, list[tuple[float, float]]]]:
        """Return the statistics of all models since the last call, for the primary worker."""
        return {alias: entry.stats.take() for alias, entry in self._entries.items() if entry.stats.last is not None}

    def add_stats(self, stats: Mapping[str, tuple[int, float | None, list[tuple[float, float]]]]) -> None:
        """Add the statistics of another worker, so that a model that is used there is not idle here."""
        for alias, values in stats.items():
            if (entry := self._entries.get(alias)) is not None:
                entry.stats.add(*values)

    async def stop(self) -> None:
        """Accept no further requests, answer the accepted ones, and unload all models."""
        await self._lifecycle.stop()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def not_found(self, name: str, reason: str = "does not exist") -> ModelNotFoundError:
        """Return the error for a name that refers to no served model, or to several."""
        aliases = [alias for entry in self._entries.values() for alias in entry.spec.aliases]
        return ModelNotFoundError(name[:200], ", ".join(aliases), reason)

    def _build_index(self) -> NameIndex:
        entries = self._entries.values()
        return NameIndex(
            [entry.spec for entry in entries if entry.configured],
            [entry.spec for entry in entries if not entry.configured],
        )

    async def _ensure_loaded(self, entry: ModelEntry) -> LoadedModel:
        """Load a model for a request, and increment its reference count. Raises ModelNotReadyError only."""
        wait_s = entry.failed_at + self._timings.retry_after_failure_s - time.monotonic()
        if entry.state is State.FAILED and wait_s > 0:
            raise _load_failure(entry, entry.error, wait_s)
        try:
            async with asyncio.timeout(self._load_wait_s):
                return await self._lifecycle.ensure_loaded(entry)
        except TimeoutError:
            waiting_for = entry.loaded_model.waiting_for if entry.loaded_model is not None else ""
            reason = f", waiting for memory ({waiting_for})" if waiting_for else ""
            left_s = None
            if entry.progress is not None and (described := entry.progress.describe()):
                reason, left_s = f": {described}", entry.progress.seconds_left
            raise ModelNotReadyError(
                f"The model `{entry.spec.alias}` is still {entry.state}{reason}. Try again later.",
                retry_after_s=_LOADING_RETRY_AFTER_S if left_s is None else max(1.0, left_s),
            ) from None
        except ModelNotReadyError:
            raise
        except ProviderError as error:
            raise _load_failure(entry, error.message, self._timings.retry_after_failure_s) from None


def _load_failure(entry: ModelEntry, reason: str | None, retry_after_s: float) -> ModelNotReadyError:
    return ModelNotReadyError(
        f"The model `{entry.spec.alias}` could not be loaded: {reason}", retry_after_s=retry_after_s
    )
