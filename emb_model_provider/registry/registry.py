"""The models of one service: found by name, lent to requests, loaded and unloaded, added and forgotten."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from emb_model_provider.errors import (
    ModelInUseError,
    ModelNotFoundError,
    ModelNotReadyError,
    NotAllowedError,
    ProviderError,
)
from emb_model_provider.model_resolver import other_names
from emb_model_provider.registry.lifecycle import Lifecycle
from emb_model_provider.registry.loader import Loader
from emb_model_provider.registry.model_entry import ModelStatus, Residence, Slot, State
from emb_model_provider.registry.watchdog import Watch
from emb_model_provider.settings import ResidencySettings

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from types import TracebackType

    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.model_spec import ModelSpec
    from emb_model_provider.registry.model_entry import Residence
    from emb_model_provider.serving.engine import Engine
    from emb_model_provider.serving.jobs import BatchRecord
    from emb_model_provider.settings import (
        BatchSettings,
        FidelitySettings,
        HubSettings,
        LimitSettings,
        ModelSettings,
        TrustSettings,
    )


_LOADING_RETRY_AFTER_S = 5.0
_FAILED_RETRY_AFTER_S = 30.0
"""How soon after a failed load a request may try again: a hub that was down comes back."""
_TOKENIZER_THREADS = 2


class Registry:
    """The models of one service. Used on one event loop."""

    def __init__(
        self,
        models: ModelSettings,
        *,
        manager: ModelManager,
        hubs: HubSettings,
        trust: TrustSettings,
        batching: BatchSettings,
        limits: LimitSettings,
        max_artifact_bytes: int,
        on_batch: Callable[[BatchRecord], None],
        fidelity: FidelitySettings | None = None,
        watchdog_s: float = 60.0,
        residency: ResidencySettings | None = None,
    ) -> None:
        residency = residency or ResidencySettings(load_wait_s=limits.request_timeout_s)
        self._load_wait_s = residency.load_wait_s
        self._slots = {
            spec.alias: Slot(spec, preload=spec.alias in models.preload, configured=True)
            for spec in models.specs
        }
        self._default = models.specs[0].alias
        self._other_names = other_names(models.specs)
        self._executor = ThreadPoolExecutor(_TOKENIZER_THREADS, thread_name_prefix="tokenize")
        self._watch = Watch(
            self._slots.values,
            watchdog_s=watchdog_s,
            idle_unload_s=residency.idle_unload_s,
            unload=lambda slot, because: self._lifecycle.begin_unloading(slot, because),
        )
        loader = Loader(
            manager=manager,
            hubs=hubs,
            trust=trust,
            batching=batching,
            limits=limits,
            max_artifact_bytes=max_artifact_bytes,
            fidelity=fidelity,
            watchdog_s=watchdog_s,
            executor=self._executor,
            on_batch=on_batch,
            stopping=lambda: self._lifecycle.stopping,
        )
        self._lifecycle = Lifecycle(
            loader, residency, watchdog_s=watchdog_s, on_left_behind=self._watch.keep_an_eye_on
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
        if name in self._slots:
            return name
        alias = self._other_names.get(name)
        if alias is None:
            raise self._not_found(name)
        return alias

    def status(self, name: str) -> ModelStatus:
        """Raises: ModelNotFoundError."""
        return self._slots[self.alias_of(name)].status()

    def statuses(self) -> list[ModelStatus]:
        """Return all models, in the order of the settings, then those that were added."""
        return [slot.status() for slot in self._slots.values()]

    # --- using ----------------------------------------------------------------------------------------

    def using(self, name: str) -> Lease:
        """Return what lends a model's engine: `async with registry.using(name) as engine`.

        A model that is not in memory is loaded first, once for however many wait, and none is unloaded while it is
        lent.

        Raises: ModelNotFoundError. Entering it raises ModelNotReadyError while stopping, where loading takes longer
        than LOAD_WAIT_S, or with the reason where loading failed.
        """
        return Lease(self._slots[self.alias_of(name)], self._join)

    async def preload(self) -> bool:
        """Load all models that are to be loaded at the start; return whether any model can answer or may later."""
        loads = [self._lifecycle.begin_loading(slot).loading for slot in self._slots.values() if slot.preload]
        if loads:
            await asyncio.wait(loads)
        return any(slot.state is not State.FAILED for slot in self._slots.values())

    async def watch(self, on_hung: Callable[[str], None] | None = None) -> None:
        """Look at all models again and again: log which hang, and unload which are idle. Ends by being cancelled.

        `on_hung` is called with what to say once a model has hung for the watchdog's time after it was noticed:
        nothing in this process can end a computation that does not end.
        """
        await self._watch.run(on_hung)

    # --- managing -------------------------------------------------------------------------------------

    async def load(self, name: str) -> ModelStatus:
        """Return a model's status once it is in memory, however long that takes; one that failed is tried at once.

        Raises: ModelNotFoundError; HubError or LoadError with the reason; ModelNotReadyError while stopping.
        """
        slot = self._slots[self.alias_of(name)]
        residence = await self._lifecycle.join(slot)
        residence.leave()
        return slot.status()

    async def unload(self, name: str, because: str = "asked to") -> ModelStatus:
        """Return a model's status once it is out of memory: requests in flight are answered first.

        A model that is being loaded is unloaded after that. The next request loads it again. `because` is one of few
        reasons: it labels a metric.

        Raises: ModelNotFoundError.
        """
        slot = self._slots[self.alias_of(name)]
        await self._lifecycle.unload(slot, because)
        return slot.status()

    def add(self, spec: ModelSpec) -> str:
        """Serve one more model from now on, loaded at its first request; return its alias.

        No name that means another model already changes its meaning, other than the alias itself.

        Raises: ModelInUseError where another model has that alias.
        """
        slot = self._slots.get(spec.alias)
        if slot is None:
            self._slots[spec.alias] = Slot(spec, preload=False, configured=False)
            self._other_names = self._names()
        elif slot.spec != spec:
            raise ModelInUseError(
                f"The alias `{spec.alias}` is taken: it serves {slot.spec.name}. Give this model another alias."
            )
        return spec.alias

    async def forget(self, alias: str) -> ModelStatus:
        """Serve a model no more that was added: its requests in flight are answered, then it is unloaded.

        Returns its status after that. No other name than its alias will do: it may mean another model by now.

        Raises: ModelNotFoundError; NotAllowedError for one that is in the settings.
        """
        slot = self._slots.get(alias)
        if slot is None:
            raise self._not_found(alias)
        if slot.configured:
            raise NotAllowedError(
                f"`{alias}` is in the settings, and is served until they are changed: unload it without forgetting it "
                "(forget=true, --forget), or take it out of EMB_PROVIDER_MODEL_MAPPING and start the service again."
            )
        del self._slots[alias]
        self._other_names = self._names()
        slot.forgotten = True
        await self._lifecycle.unload(slot, "forgotten")
        return slot.status()

    async def stop(self) -> None:
        """Let no more requests in, finish those that were accepted, free all models."""
        await self._lifecycle.stop()
        self._executor.shutdown(wait=False, cancel_futures=True)

    # --- odds and ends --------------------------------------------------------------------------------

    def _names(self) -> dict[str, str]:
        slots = self._slots.values()
        return other_names(
            [slot.spec for slot in slots if slot.configured],
            [slot.spec for slot in slots if not slot.configured],
        )

    def _not_found(self, name: str) -> ModelNotFoundError:
        return ModelNotFoundError(name[:200], ", ".join(self._slots))

    async def _join(self, slot: Slot) -> Residence:
        """Return a model's stay for a request, which is counted as its user.

        Raises: ModelNotReadyError.
        """
        wait_s = slot.failed_at + _FAILED_RETRY_AFTER_S - time.monotonic()
        if slot.state is State.FAILED and wait_s > 0:
            raise _failure(slot, slot.error, wait_s)
        try:
            async with asyncio.timeout(self._load_wait_s):
                return await self._lifecycle.join(slot)
        except TimeoutError:
            raise ModelNotReadyError(
                f"The model `{slot.spec.alias}` is still {slot.state}{slot.held_up_by}: ask again later.",
                retry_after_s=_LOADING_RETRY_AFTER_S,
            ) from None
        except ModelNotReadyError:
            raise
        except ProviderError as error:
            raise _failure(slot, error.message, _FAILED_RETRY_AFTER_S) from None


def _failure(slot: Slot, reason: str | None, retry_after_s: float) -> ModelNotReadyError:
    return ModelNotReadyError(
        f"The model `{slot.spec.alias}` could not be loaded: {reason}", retry_after_s=retry_after_s
    )


class Lease:
    """`async with` it once for the model's engine; a model that is not in memory is loaded first."""

    __slots__ = ("_arrive", "_began", "_residence", "_slot")

    def __init__(self, slot: Slot, arrive: Callable[[Slot], Awaitable[Residence]]) -> None:
        """`arrive` returns the stay of a model that is not there yet, the caller counted as its user."""
        self._slot = slot
        self._arrive = arrive

    async def __aenter__(self) -> Engine:
        """Raises: ModelNotReadyError, ModelNotFoundError."""
        residence = self._slot.residence
        if residence is None or residence.engine is None:
            residence = await self._arrive(self._slot)
        else:
            residence.users += 1
        self._residence = residence
        self._began = time.monotonic()
        engine = residence.engine
        if engine is None:
            raise RuntimeError("a model that was loaded has an engine")
        return engine

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._residence.leave()
        self._slot.usage.note(self._began, time.monotonic(), answered=kind is None)
