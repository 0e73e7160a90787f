"""Removal of models from disk while they may be served: unload them, remove their files, retry if they are in use."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.requests import ClientDisconnect

from emb_model_provider.errors import ModelInUseError, ModelNotFoundError
from emb_model_provider.registry import State

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from starlette.requests import Request

    from emb_model_provider.api.dependencies import Services
    from emb_model_provider.api.schemas.management import RemoveAllQuery
    from emb_model_provider.management.types import CachedModelRecord, Removal
    from emb_model_provider.registry import ModelStatus

_RETRY_EVERY_S = 0.25
_UNLOAD_ATTEMPTS = 5
"""How often a model is unloaded if requests load it again before its files are removed."""
_NOT_LOADED = (State.UNLOADED, State.FAILED)


class CacheRemoval:
    """One request to remove models from disk."""

    def __init__(self, services: Services, request: Request, query: RemoveAllQuery) -> None:
        self._services = services
        self._registry = services.registry
        self._request = request
        self._query = query
        self._unloaded: list[ModelStatus] = []
        self._deadline = time.monotonic() + query.wait_s
        self._attempts_left = _UNLOAD_ATTEMPTS if query.unload else 1

    async def run(
        self, models: Sequence[CachedModelRecord], remove: Callable[..., Removal]
    ) -> tuple[Removal, list[str]]:
        """Remove models, unloading them first if the query asks for it.

        Args:
            models: The models to remove.
            remove: Removes them. Takes `dry_run` and `released`, as `ModelManager.remove` does.

        Returns:
            What was removed, and the aliases that were unloaded; of a dry run, what would be.

        Raises:
            ModelInUseError: A model is in use.
            ModelNotReadyError: The service shuts down.
            ClientDisconnect: The client disconnected.
        """
        if self._query.dry_run:
            return await self._dry_run(models, remove)
        try:
            removal = await self._remove(models, remove)
            while removal.kept and await self._should_retry():
                again = await self._remove(models, remove)
                removal = again.model_copy(
                    update={
                        "models": [*removal.models, *again.models],
                        "artifacts": [*removal.artifacts, *again.artifacts],
                        "freed": removal.freed + again.freed,
                    }
                )
        except BaseException:
            self._serve_again(self._unloaded)
            raise
        self._serve_again(models_using(removal.kept, self._unloaded))
        return removal, _aliases(self._unloaded)

    async def _dry_run(
        self, models: Sequence[CachedModelRecord], remove: Callable[..., Removal]
    ) -> tuple[Removal, list[str]]:
        holders = models_using(models, self._registry.statuses())
        released = [Path(model.path) for model in models if model.path and models_using([model], holders)]
        if not self._query.unload:
            released = []
        try:
            removal = await self._services.in_disk_thread(partial(remove, dry_run=True, released=released))
        except ModelInUseError as error:
            raise self._explain(error, holders) from error
        return removal, _aliases(holders) if self._query.unload else []

    async def _remove(self, models: Sequence[CachedModelRecord], remove: Callable[..., Removal]) -> Removal:
        while True:
            if self._query.unload:
                await self._unload(models_using(models, self._registry.statuses()))
            try:
                return await self._services.in_disk_thread(remove)
            except ModelInUseError as error:
                if not await self._should_retry():
                    raise self._explain(error, models_using(models, self._registry.statuses())) from error

    async def _unload(self, holders: Sequence[ModelStatus]) -> None:
        self._unloaded += holders
        for status in holders:
            alias = status.spec.alias
            if status.configured:
                unloading = self._registry.unload(alias, reason="its files are removed")
                await self._services.background.wait(unloading)
            else:
                # Stop serving it, because the next request would download the files again.
                with suppress(ModelNotFoundError):
                    await self._services.background.wait(self._registry.remove(alias))

    def _serve_again(self, unloaded: Sequence[ModelStatus]) -> None:
        """Add models to the registry again that are not in the settings, because their files were not removed."""
        for status in unloaded:
            if not status.configured:
                with suppress(ModelInUseError):  # another model has its alias now
                    self._registry.add(status.spec)

    async def _should_retry(self) -> bool:
        """Wait before the next attempt; return False instead if there is none."""
        self._attempts_left -= 1
        if self._attempts_left <= 0 and time.monotonic() >= self._deadline:
            return False
        await self._request.body()
        if await self._request.is_disconnected():
            raise ClientDisconnect
        self._services.background.raise_if_shutting_down()
        await asyncio.sleep(_RETRY_EVERY_S)
        return True

    def _explain(self, error: ModelInUseError, holders: Sequence[ModelStatus]) -> ModelInUseError:
        """Return the error with what the client can do about models of this service."""
        if holders and not self._query.unload:
            first, *_ = aliases = _aliases(holders)
            return ModelInUseError(
                f"The model is loaded as {_quote(aliases)}. Nothing was removed. To unload it first, add unload=true, or "
                f"POST /api/models/unload?model_name={first}."
            )
        if self._unloaded:
            return ModelInUseError(
                f"{error.message} The service unloaded {_quote(_aliases(self._unloaded))} for this; the next request "
                "loads it again."
            )
        return error


def models_using(models: Sequence[CachedModelRecord], statuses: Sequence[ModelStatus]) -> list[ModelStatus]:
    """Return the served models that are loaded from the files of any of these models, or are being loaded."""

    def uses(status: ModelStatus) -> bool:
        if status.state in _NOT_LOADED:
            return False
        if status.snapshot is None:
            return any(status.spec.name == model.model_name for model in models)
        return any(str(status.snapshot.path) == model.path for model in models)

    return [status for status in statuses if uses(status)]


def _aliases(statuses: Sequence[ModelStatus]) -> list[str]:
    return list(dict.fromkeys(status.spec.alias for status in statuses))


def _quote(aliases: Sequence[str]) -> str:
    return ", ".join(f"`{alias}`" for alias in aliases)
