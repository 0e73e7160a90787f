"""Removing a model's files while it may be served: unload, remove, and again where a request was quicker."""

from __future__ import annotations

import asyncio
import time
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from emb_model_provider.api.disconnect import ClientGoneError
from emb_model_provider.errors import ModelInUseError, ModelNotFoundError, ModelNotReadyError
from emb_model_provider.management.entries import Removal
from emb_model_provider.registry import State

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from starlette.requests import Request

    from emb_model_provider.api.schemas_manage import RemoveAllQuery, RemoveQuery
    from emb_model_provider.management.entries import CachedSnapshot
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.registry import ModelStatus, Registry

_TRY_AGAIN_S = 0.25
_ROUNDS = 5
"""How often a model is unloaded, where requests load it again before its files are gone."""
_NOT_LOADED = (State.UNLOADED, State.FAILED)
_STOPPING_RETRY_AFTER_S = 5.0

T = TypeVar("T")


class OnDisk(Protocol):
    """Runs what reads or writes the disk on a thread that may."""

    async def __call__(self, work: Callable[[], T]) -> T: ...


class Remover:
    """Removes models from disk, unloading them first where that is asked for."""

    def __init__(self, registry: Registry, on_disk: OnDisk, is_stopping: Callable[[], bool]) -> None:
        self._registry = registry
        self._on_disk = on_disk
        self._is_stopping = is_stopping

    async def remove(
        self,
        request: Request,
        manager: ModelManager,
        name: str,
        snapshots: Sequence[CachedSnapshot],
        query: RemoveQuery,
    ) -> tuple[Removal, list[str]]:
        """Return what was removed, and the aliases that were unloaded for it.

        Raises: ModelInUseError; ClientGoneError where the caller went away while it waited.
        """
        again = _Rounds(query)
        unloaded: list[str] = []
        while True:
            holders = loaded_from(snapshots, self._registry.statuses())
            if query.unload and query.dry_run and holders:
                elsewhere = await self._on_disk(manager.list)
                return _all_of(snapshots, elsewhere), [status.spec.alias for status in holders]
            if query.unload:
                unloaded += await self._unload(holders)
            try:
                removal = await self._on_disk(
                    partial(
                        manager.remove,
                        name,
                        source=query.source,
                        revision=query.revision,
                        dry_run=query.dry_run,
                    )
                )
            except ModelInUseError as error:
                if not again.is_worth_it():
                    raise _explained(error, loaded_from(snapshots, self._registry.statuses())) from error
                await self._pause(request)
            else:
                return removal, _distinct(unloaded)

    async def remove_all(
        self,
        request: Request,
        manager: ModelManager,
        snapshots: Sequence[CachedSnapshot],
        query: RemoveAllQuery,
    ) -> tuple[Removal, list[str]]:
        """Return what was removed and what was kept, and the aliases that were unloaded for it."""
        again = _Rounds(query)
        unloaded: list[str] = []
        so_far = Removal(snapshots=(), artifacts=(), freed=0)
        while True:
            holders = loaded_from(snapshots, self._registry.statuses())
            if query.unload and query.dry_run and holders:
                return _all_of(snapshots, ()), [status.spec.alias for status in holders]
            if query.unload:
                unloaded += await self._unload(holders)
            removal = await self._on_disk(partial(manager.remove_all, dry_run=query.dry_run))
            so_far = Removal(
                snapshots=[*so_far.snapshots, *removal.snapshots],
                artifacts=[*so_far.artifacts, *removal.artifacts],
                freed=so_far.freed + removal.freed,
                kept=removal.kept,
            )
            if not removal.kept or not again.is_worth_it():
                return so_far, _distinct(unloaded)
            await self._pause(request)

    async def _unload(self, holders: Sequence[ModelStatus]) -> list[str]:
        for status in holders:
            try:
                await self._registry.unload(status.spec.alias, because="its files are removed")
                if not status.configured:
                    # The settings do not ask for it. A request would only fetch again what is to go.
                    await self._registry.forget(status.spec.alias)
            except ModelNotFoundError:
                continue
        return [status.spec.alias for status in holders]

    async def _pause(self, request: Request) -> None:
        await request.body()
        if await request.is_disconnected():
            raise ClientGoneError
        if self._is_stopping():
            raise ModelNotReadyError(
                "The service is shutting down: ask again later.", retry_after_s=_STOPPING_RETRY_AFTER_S
            )
        await asyncio.sleep(_TRY_AGAIN_S)


class _Rounds:
    """Whether what is in use is tried once more."""

    def __init__(self, query: RemoveAllQuery) -> None:
        self._give_up_at = time.monotonic() + query.wait_s
        self._left = _ROUNDS if query.unload and not query.dry_run else 1

    def is_worth_it(self) -> bool:
        self._left -= 1
        return self._left > 0 or time.monotonic() < self._give_up_at


def loaded_from(snapshots: Sequence[CachedSnapshot], statuses: Sequence[ModelStatus]) -> list[ModelStatus]:
    """Return the models that hold any of these files: loaded from them, or on the way there."""

    def holds(status: ModelStatus) -> bool:
        if status.state in _NOT_LOADED:
            return False
        if status.snapshot is None:
            return any(status.spec.name == snapshot.name for snapshot in snapshots)
        return any(status.snapshot.path == snapshot.path for snapshot in snapshots)

    return [status for status in statuses if holds(status)]


def _explained(error: ModelInUseError, holders: Sequence[ModelStatus]) -> ModelInUseError:
    if not holders:
        return error
    aliases = [status.spec.alias for status in holders]
    return ModelInUseError(
        f"It is loaded here as {', '.join(f'`{alias}`' for alias in aliases)}, and nothing was removed. To unload it "
        f"first, add unload=true, or POST /api/models/unload?model_name={aliases[0]}."
    )


def _all_of(snapshots: Sequence[CachedSnapshot], present: Sequence[CachedSnapshot]) -> Removal:
    """Return what removing them would remove once they are unloaded; of what is `present`, the rest stays."""
    paths = {snapshot.path for snapshot in snapshots}
    shared = {each.key for other in present if other.path not in paths for each in other.artifacts}
    artifacts = {
        artifact.key: artifact.size
        for snapshot in snapshots
        for artifact in snapshot.artifacts
        if artifact.key not in shared
    }
    files = sum(snapshot.size for snapshot in snapshots if snapshot.owns_files)
    return Removal(snapshots=snapshots, artifacts=list(artifacts), freed=files + sum(artifacts.values()))


def _distinct(aliases: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(aliases))
