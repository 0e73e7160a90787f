"""The served models of one service: names, leases, loading and unloading, adding and removing."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from emb_model_provider.errors import (
    ModelInUseError,
    ModelNotFoundError,
    ModelNotReadyError,
    NotAllowedError,
    ProviderError,
)
from emb_model_provider.model_resolver import build_alias_index
from emb_model_provider.progress import CancelToken
from emb_model_provider.registry.lifecycle import Lifecycle
from emb_model_provider.registry.loader import Loader
from emb_model_provider.registry.model_entry import ModelEntry, ModelStatus, State
from emb_model_provider.registry.watchdog import Watchdog
from emb_model_provider.serving.config import EngineConfig, Timings
from emb_model_provider.settings import BatchSettings, LimitSettings, MemorySettings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.registry.model_entry import LoadedModel
    from emb_model_provider.serving.engine import Engine
    from emb_model_provider.serving.jobs import BatchRecord
    from emb_model_provider.settings import ServedModels

_LOADING_RETRY_AFTER_S = 5.0
_TOKENIZER_THREADS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RegistryConfig:
    """Configuration of a registry and its engines."""

    batching: BatchSettings = field(default_factory=BatchSettings)
    limits: LimitSettings = field(default_factory=LimitSettings)
    memory: MemorySettings = field(default_factory=MemorySettings)
    watchdog_s: float = 60.0
    """A batch that runs longer counts as hung, in seconds."""
    on_batch: Callable[[BatchRecord], None] = lambda _: None
    """Called on a thread of the model after each batch."""
    timings: Timings = field(default_factory=Timings)


class Lease:
    """A request's use of a loaded model. `async with` it once to get the engine; the model is loaded if necessary."""

    __slots__ = ("_began", "_entry", "_load", "_loaded_model")

    def __init__(self, entry: ModelEntry, load: Callable[[ModelEntry], Awaitable[LoadedModel]]) -> None:
        """Create a lease.

        Args:
            entry: The model.
            load: Loads the model and increments its reference count.
        """
        self._entry = entry
        self._load = load

    async def __aenter__(self) -> Engine:
        """Load the model if necessary, and return its engine.

        Raises:
            ModelNotReadyError: The model cannot be loaded, or not within LOAD_WAIT_S, or the service is shutting down.
        """
        loaded_model = self._entry.loaded_model
        if loaded_model is None or loaded_model.engine is None:
            loaded_model = await self._load(self._entry)
        else:
            loaded_model.ref_count += 1
        self._loaded_model = loaded_model
        self._began = time.monotonic()
        engine = loaded_model.engine
        if engine is None:
            raise RuntimeError("the load returned without an engine")
        return engine

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loaded_model.release_ref()
        self._entry.stats.record(self._began, time.monotonic(), answered=kind is None)


class Registry:
    """The models of one service. Used on one event loop."""

    def __init__(self, models: ServedModels, manager: ModelManager, config: RegistryConfig) -> None:
        """Create a registry; it loads nothing yet.

        Args:
            models: The configured models.
            manager: Provides files and backends.
            config: Configuration of the registry and its engines.
        """
        memory, limits = config.memory, config.limits
        self._load_wait_s = limits.request_timeout_s if memory.load_wait_s is None else memory.load_wait_s
        self._timings = config.timings
        self._entries = {
            spec.alias: ModelEntry(
                spec, preload=spec.alias in models.preload, configured=True, slow_load_s=config.timings.slow_load_s
            )
            for spec in models.specs
        }
        self._default = models.specs[0].alias
        self._alias_index = build_alias_index(models.specs)
        self._executor = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="tokenize")
        self._watchdog = Watchdog(
            self._entries.values,
            watchdog_s=config.watchdog_s,
            idle_unload_s=memory.idle_unload_s,
            unload=lambda entry, reason: self._lifecycle.begin_unloading(entry, reason),
        )
        engine_config = EngineConfig(
            executor=self._executor,
            batching=config.batching,
            limits=limits,
            watchdog_s=config.watchdog_s,
            on_batch=config.on_batch,
            timings=config.timings,
        )
        cancel = CancelToken(lambda: self._lifecycle.stopping)
        self._lifecycle = Lifecycle(
            Loader(manager, engine_config, cancel),
            memory,
            watchdog_s=config.watchdog_s,
            stop_s=config.timings.stop_s,
            on_abandoned=self._watchdog.track,
        )

    # --- names and states -----------------------------------------------------------------------------

    @property
    def default_alias(self) -> str:
        """Alias of the model that serves requests without a model name."""
        return self._default

    def alias_of(self, name: str) -> str:
        """Return the alias that a name refers to.

        Args:
            name: An alias, the id of a model (its first alias is returned), or the last part of an id or alias if it is
                unique.

        Raises:
            ModelNotFoundError: The name refers to no served model, or to several.
        """
        if name in self._entries:
            return name
        alias = self._alias_index.get(name)
        if alias is None:
            raise self._not_found(name)
        return alias

    def status(self, name: str) -> ModelStatus:
        """Return the status of a model.

        Raises:
            ModelNotFoundError: The name refers to no served model.
        """
        return self._entries[self.alias_of(name)].status()

    def statuses(self) -> list[ModelStatus]:
        """Return the status of all models: those of the settings in their order, then the added ones."""
        return [entry.status() for entry in self._entries.values()]

    # --- serving --------------------------------------------------------------------------------------

    def lease(self, name: str) -> Lease:
        """Return a lease on a model: `async with registry.lease(name) as engine`.

        A model that is not in memory is loaded first, once for all requests that wait for it. A model is not unloaded
        during a lease.

        Raises:
            ModelNotFoundError: The name refers to no served model.
        """
        return Lease(self._entries[self.alias_of(name)], self._ensure_loaded)

    async def preload(self) -> bool:
        """Load the models that are to be loaded at startup.

        Returns:
            Whether at least one model of the registry has not failed.
        """
        loads = [self._lifecycle.begin_loading(entry).loading for entry in self._entries.values() if entry.preload]
        if loads:
            await asyncio.wait(loads)
        return any(entry.state is not State.FAILED for entry in self._entries.values())

    async def watch(self, on_hung: Callable[[str], None] | None = None) -> None:
        """Watch all models until cancelled: report those that hang, and unload those that are idle.

        Args:
            on_hung: Called with the reason when a model has hung for another `watchdog_s` seconds after it was
                reported.
                A computation that does not end can only be ended with its process.
        """
        await self._watchdog.run(on_hung)

    # --- managing -------------------------------------------------------------------------------------

    async def load(self, name: str) -> ModelStatus:
        """Load a model, however long it takes, and return its status. A model that failed is loaded again at once.

        Raises:
            ModelNotFoundError: The name refers to no served model.
            HubError, LoadError: The model cannot be loaded.
            ModelNotReadyError: The service is shutting down, or the model was removed.
        """
        entry = self._entries[self.alias_of(name)]
        loaded_model = await self._lifecycle.ensure_loaded(entry)
        loaded_model.release_ref()
        return entry.status()

    async def unload(self, name: str, reason: str = "asked to") -> ModelStatus:
        """Unload a model after its requests are answered, and return its status.

        If the model is being loaded, it is unloaded after the load. The next request loads it again.

        Args:
            name: A name of the model.
            reason: One of few fixed texts, because it is a label of a metric.

        Raises:
            ModelNotFoundError: The name refers to no served model.
        """
        entry = self._entries[self.alias_of(name)]
        await self._lifecycle.unload(entry, reason)
        return entry.status()

    def add(self, spec: ModelSpec) -> str:
        """Serve another model, which is loaded at its first request.

        Except for the alias, no name that refers to another model changes its meaning.

        Returns:
            The alias of the model.

        Raises:
            ModelInUseError: Another model has this alias.
        """
        entry = self._entries.get(spec.alias)
        if entry is None:
            self._entries[spec.alias] = ModelEntry(
                spec, preload=False, configured=False, slow_load_s=self._timings.slow_load_s
            )
            self._alias_index = self._build_index()
        elif entry.spec != spec:
            raise ModelInUseError(
                f"The alias `{spec.alias}` is taken by {entry.spec.name}. Choose another alias for this model."
            )
        return spec.alias

    async def remove(self, alias: str) -> ModelStatus:
        """Stop serving a model that was added at run time, unload it after its requests are answered.

        Args:
            alias: The alias of the model. Other names are not accepted, because they may refer to another model
                meanwhile.

        Returns:
            The status of the unloaded model.

        Raises:
            ModelNotFoundError: No model has this alias.
            NotAllowedError: The model is in the settings.
        """
        entry = self._entries.get(alias)
        if entry is None:
            raise self._not_found(alias)
        if entry.configured:
            raise NotAllowedError(
                f"`{alias}` is in the settings and cannot be removed while the service runs. Unload it without "
                "removing it (forget=false), or remove it from EMB_PROVIDER_MODEL_MAPPING and restart the service."
            )
        del self._entries[alias]
        self._alias_index = self._build_index()
        entry.removed = True
        await self._lifecycle.unload(entry, "forgotten")
        return entry.status()

    async def stop(self) -> None:
        """Accept no further requests, answer the accepted ones, and unload all models."""
        await self._lifecycle.stop()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _build_index(self) -> dict[str, str]:
        entries = self._entries.values()
        return build_alias_index(
            [entry.spec for entry in entries if entry.configured],
            [entry.spec for entry in entries if not entry.configured],
        )

    def _not_found(self, name: str) -> ModelNotFoundError:
        return ModelNotFoundError(name[:200], ", ".join(self._entries))

    async def _ensure_loaded(self, entry: ModelEntry) -> LoadedModel:
        """Load a model for a request, and increment its reference count. Raises ModelNotReadyError only."""
        wait_s = entry.failed_at + self._timings.retry_after_failure_s - time.monotonic()
        if entry.state is State.FAILED and wait_s > 0:
            raise _load_failure(entry, entry.error, wait_s)
        try:
            async with asyncio.timeout(self._load_wait_s):
                return await self._lifecycle.ensure_loaded(entry)
        except TimeoutError:
            raise ModelNotReadyError(
                f"The model `{entry.spec.alias}` is still {entry.state}{entry.blocked_by}. Try again later.",
                retry_after_s=_LOADING_RETRY_AFTER_S,
            ) from None
        except ModelNotReadyError:
            raise
        except ProviderError as error:
            raise _load_failure(entry, error.message, self._timings.retry_after_failure_s) from None


def _load_failure(entry: ModelEntry, reason: str | None, retry_after_s: float) -> ModelNotReadyError:
    return ModelNotReadyError(
        f"The model `{entry.spec.alias}` could not be loaded: {reason}", retry_after_s=retry_after_s
    )
