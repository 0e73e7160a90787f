"""Removing a model's files while it may be served: unload, remove, and again where a request was quicker."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from emb_model_provider.api.middleware import ClientGoneError
from emb_model_provider.errors import ModelInUseError, ModelNotFoundError
from emb_model_provider.management.types import Removal
from emb_model_provider.registry import State

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from starlette.requests import Request

    from emb_model_provider.api.background_tasks import GoingOn
    from emb_model_provider.api.schemas.management import RemoveAllQuery, RemoveQuery
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.management.types import CachedSnapshot
    from emb_model_provider.registry import ModelStatus, Registry

_TRY_AGAIN_S = 0.25
_ROUNDS = 5
"""How often a model is unloaded, where requests load it again before its files are gone."""
_NOT_LOADED = (State.UNLOADED, State.FAILED)

T = TypeVar("T")


class OnDisk(Protocol):
    """Runs what reads or writes the disk on a thread that may."""

    async def __call__(self, work: Callable[[], T]) -> T: ...


class Remover:
    """Removes models from disk, unloading them first where that is asked for."""

    def __init__(self, registry: Registry, on_disk: OnDisk, going_on: GoingOn) -> None:
        self._registry = registry
        self._on_disk = on_disk
        self._going_on = going_on

    async def remove(
        self,
        request: Request,
        manager: ModelManager,
        name: str,
        snapshots: Sequence[CachedSnapshot],
        query: RemoveQuery,
    ) -> tuple[Removal, list[str]]:
        """Return what was removed, and the aliases that were unloaded for it.

        Raises: ModelInUseError; ModelNotReadyError where the service is to end while it waits; ClientGoneError where
        the caller went away.
        """
        again = _Rounds(query)
        unloaded: list[ModelStatus] = []
        try:
            while True:
                holders = loaded_from(snapshots, self._registry.statuses())
                if query.unload and query.dry_run and holders:
                    elsewhere = await self._on_disk(manager.list)
                    return _all_of(snapshots, elsewhere), _aliases(holders)
                if query.unload:
                    unloaded += holders
                    await self._unload(holders)
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
                        holders = loaded_from(snapshots, self._registry.statuses())
                        raise _explained(error, holders, unloaded) from error
                    await self._pause(request)
                else:
                    return removal, _aliases(unloaded)
        except BaseException:
            self._serve_again(unloaded)
            raise

    async def remove_all(
        self,
        request: Request,
        manager: ModelManager,
        snapshots: Sequence[CachedSnapshot],
        query: RemoveAllQuery,
    ) -> tuple[Removal, list[str]]:
        """Return what was removed and what was kept, and the aliases that were unloaded for it. Raises: as `remove`."""
        again = _Rounds(query)
        unloaded: list[ModelStatus] = []
        so_far = Removal(snapshots=(), artifacts=(), freed=0)
        try:
            while True:
                holders = loaded_from(snapshots, self._registry.statuses())
                if query.unload and query.dry_run and holders:
                    return _all_but_others(snapshots, holders), _aliases(holders)
                if query.unload:
                    unloaded += holders
                    await self._unload(holders)
                removal = await self._on_disk(partial(manager.remove_all, dry_run=query.dry_run))
                so_far = Removal(
                    snapshots=[*so_far.snapshots, *removal.snapshots],
                    artifacts=[*so_far.artifacts, *removal.artifacts],
                    freed=so_far.freed + removal.freed,
                    kept=removal.kept,
                )
                if not removal.kept or not again.is_worth_it():
                    self._serve_again(loaded_from([kept for kept, _ in removal.kept], unloaded))
                    return so_far, _aliases(unloaded)
                await self._pause(request)
        except BaseException:
            self._serve_again(unloaded)
            raise

    async def _unload(self, holders: Sequence[ModelStatus]) -> None:
        for status in holders:
            alias = status.spec.alias
            if status.configured:
                unloading = self._registry.unload(alias, because="its files are removed")
                await self._going_on.finished(unloading)
                continue
            # The settings do not ask for it. A request would only fetch again what is to go.
            with suppress(ModelNotFoundError):
                await self._going_on.finished(self._registry.forget(alias))

    def _serve_again(self, unloaded: Sequence[ModelStatus]) -> None:
        """Undo what was forgotten for a removal that did not come to be."""
        for status in unloaded:
            if not status.configured:
                with suppress(ModelInUseError):  # somebody gave its name to another one meanwhile
                    self._registry.add(status.spec)

    async def _pause(self, request: Request) -> None:
        await request.body()
        if await request.is_disconnected():
            raise ClientGoneError
        self._going_on.require_time()
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


def _explained(
    error: ModelInUseError, holders: Sequence[ModelStatus], unloaded: Sequence[ModelStatus]
) -> ModelInUseError:
    if holders:
        first, *_ = aliases = _aliases(holders)
        return ModelInUseError(
            f"It is loaded here as {_quoted(aliases)}, and nothing was removed. To unload it first, add unload=true, or "
            f"POST /api/models/unload?model_name={first}."
        )
    if unloaded:
        return ModelInUseError(
            f"{error.message} Here {_quoted(_aliases(unloaded))} was unloaded for it; the next request loads it again."
        )
    return error


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


def _all_but_others(snapshots: Sequence[CachedSnapshot], holders: Sequence[ModelStatus]) -> Removal:
    """Return what removing all of them would remove once `holders` are unloaded; what others use stays."""
    free = [each for each in snapshots if not each.in_use or loaded_from([each], holders)]
    kept = [(each, "another process, or a download, uses it now") for each in snapshots if each not in free]
    return replace(_all_of(free, snapshots), kept=kept)


def _aliases(statuses: Sequence[ModelStatus]) -> list[str]:
    return list(dict.fromkeys(status.spec.alias for status in statuses))


def _quoted(aliases: Sequence[str]) -> str:
    return ", ".join(f"`{alias}`" for alias in aliases)
