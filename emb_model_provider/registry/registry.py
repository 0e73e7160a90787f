"""The models of one service: found by name, lent to requests, loaded and unloaded, added and forgotten."""

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
from emb_model_provider.registry.model_entry import LoadedModel, ModelEntry, ModelStatus, State
from emb_model_provider.registry.watchdog import Watchdog
from emb_model_provider.serving.engine import EngineConfig
from emb_model_provider.serving.scheduler import Timings
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
    """Called on a model's thread after each batch."""
    timings: Timings = field(default_factory=Timings)


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
                spec,
                preload=spec.alias in models.preload,
                configured=True,
                slow_load_s=config.timings.slow_load_s,
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

    # --- looking --------------------------------------------------------------------------------------

    @property
    def default_alias(self) -> str:
        """The model of a request that names none."""
        return self._default

    def alias_of(self, name: str) -> str:
        """Return the alias that `name` means: an alias, a model's id (its first alias), or a unique last part.

        Raises: ModelNotFoundError.
        """
        if name in self._entries:
            return name
        alias = self._alias_index.get(name)
        if alias is None:
            raise self._not_found(name)
        return alias

    def status(self, name: str) -> ModelStatus:
        """Raises: ModelNotFoundError."""
        return self._entries[self.alias_of(name)].status()

    def statuses(self) -> list[ModelStatus]:
        """Return all models, in the order of the settings, then those that were added."""
        return [entry.status() for entry in self._entries.values()]

    # --- using ----------------------------------------------------------------------------------------

    def lease(self, name: str) -> Lease:
        """Return what lends a model's engine: `async with registry.lease(name) as engine`.

        A model that is not in memory is loaded first, once for however many wait, and none is unloaded while it is
        lent.

        Raises: ModelNotFoundError. Entering it raises ModelNotReadyError while stopping, where loading takes longer
        than LOAD_WAIT_S, or with the reason where loading failed.
        """
        return Lease(self._entries[self.alias_of(name)], self._ensure_loaded)

    async def preload(self) -> bool:
        """Load all models that are to be loaded at the start; return whether any model can answer or may later."""
        loads = [
            self._lifecycle.begin_loading(entry).loading for entry in self._entries.values() if entry.preload
        ]
        if loads:
            await asyncio.wait(loads)
        return any(entry.state is not State.FAILED for entry in self._entries.values())

    async def watch(self, on_hung: Callable[[str], None] | None = None) -> None:
        """Look at all models again and again: log which hang, and unload which are idle. Ends by being cancelled.

        `on_hung` is called with what to say once a model has hung for the watchdog's time after it was noticed:
        nothing in this process can end a computation that does not end.
        """
        await self._watchdog.run(on_hung)

    # --- managing -------------------------------------------------------------------------------------

    async def load(self, name: str) -> ModelStatus:
        """Return a model's status once it is in memory, however long that takes; one that failed is tried at once.

        Raises: ModelNotFoundError; HubError or LoadError with the reason; ModelNotReadyError while stopping.
        """
        entry = self._entries[self.alias_of(name)]
        loaded_model = await self._lifecycle.ensure_loaded(entry)
        loaded_model.release_ref()
        return entry.status()

    async def unload(self, name: str, reason: str = "asked to") -> ModelStatus:
        """Return a model's status once it is out of memory: requests in flight are answered first.

        A model that is being loaded is unloaded after that. The next request loads it again. `reason` is one of few
        reasons: it labels a metric.

        Raises: ModelNotFoundError.
        """
        entry = self._entries[self.alias_of(name)]
        await self._lifecycle.unload(entry, reason)
        return entry.status()

    def add(self, spec: ModelSpec) -> str:
        """Serve one more model from now on, loaded at its first request; return its alias.

        No name that means another model already changes its meaning, other than the alias itself.

        Raises: ModelInUseError where another model has that alias.
        """
        entry = self._entries.get(spec.alias)
        if entry is None:
            self._entries[spec.alias] = ModelEntry(
                spec, preload=False, configured=False, slow_load_s=self._timings.slow_load_s
            )
            self._alias_index = self._build_index()
        elif entry.spec != spec:
            raise ModelInUseError(
                f"The alias `{spec.alias}` is taken: it serves {entry.spec.name}. Give this model another alias."
            )
        return spec.alias

    async def remove(self, alias: str) -> ModelStatus:
        """Serve a model no more that was added: its requests in flight are answered, then it is unloaded.

        Returns its status after that. No other name than its alias will do: it may mean another model by now.

        Raises: ModelNotFoundError; NotAllowedError for one that is in the settings.
        """
        entry = self._entries.get(alias)
        if entry is None:
            raise self._not_found(alias)
        if entry.configured:
            raise NotAllowedError(
                f"`{alias}` is in the settings, and is served until they are changed: unload it without forgetting it "
                "(forget=true, --forget), or take it out of EMB_PROVIDER_MODEL_MAPPING and start the service again."
            )
        del self._entries[alias]
        self._alias_index = self._build_index()
        entry.removed = True
        await self._lifecycle.unload(entry, "forgotten")
        return entry.status()

    async def stop(self) -> None:
        """Let no more requests in, finish those that were accepted, free all models."""
        await self._lifecycle.stop()
        self._executor.shutdown(wait=False, cancel_futures=True)

    # --- odds and ends --------------------------------------------------------------------------------

    def _build_index(self) -> dict[str, str]:
        entries = self._entries.values()
        return build_alias_index(
            [entry.spec for entry in entries if entry.configured],
            [entry.spec for entry in entries if not entry.configured],
        )

    def _not_found(self, name: str) -> ModelNotFoundError:
        return ModelNotFoundError(name[:200], ", ".join(self._entries))

    async def _ensure_loaded(self, entry: ModelEntry) -> LoadedModel:
        """Return a model's stay for a request, which is counted as its user.

        Raises: ModelNotReadyError.
        """
        wait_s = entry.failed_at + self._timings.retry_after_failure_s - time.monotonic()
        if entry.state is State.FAILED and wait_s > 0:
            raise _failure(entry, entry.error, wait_s)
        try:
            async with asyncio.timeout(self._load_wait_s):
                return await self._lifecycle.ensure_loaded(entry)
        except TimeoutError:
            raise ModelNotReadyError(
                f"The model `{entry.spec.alias}` is still {entry.state}{entry.blocked_by}: ask again later.",
                retry_after_s=_LOADING_RETRY_AFTER_S,
            ) from None
        except ModelNotReadyError:
            raise
        except ProviderError as error:
            raise _failure(entry, error.message, self._timings.retry_after_failure_s) from None


def _failure(entry: ModelEntry, reason: str | None, retry_after_s: float) -> ModelNotReadyError:
    return ModelNotReadyError(
        f"The model `{entry.spec.alias}` could not be loaded: {reason}", retry_after_s=retry_after_s
    )


class Lease:
    """`async with` it once for the model's engine; a model that is not in memory is loaded first."""

    __slots__ = ("_began", "_entry", "_load", "_loaded_model")

    def __init__(self, entry: ModelEntry, load: Callable[[ModelEntry], Awaitable[LoadedModel]]) -> None:
        """`load` returns the stay of a model that is not there yet, the caller counted as its user."""
        self._entry = entry
        self._load = load

    async def __aenter__(self) -> Engine:
        """Raises: ModelNotReadyError, ModelNotFoundError."""
        loaded_model = self._entry.loaded_model
        if loaded_model is None or loaded_model.engine is None:
            loaded_model = await self._load(self._entry)
        else:
            loaded_model.ref_count += 1
        self._loaded_model = loaded_model
        self._began = time.monotonic()
        engine = loaded_model.engine
        if engine is None:
            raise RuntimeError("a model that was loaded has an engine")
        return engine

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loaded_model.release_ref()
        self._entry.stats.record(self._began, time.monotonic(), answered=kind is None)
