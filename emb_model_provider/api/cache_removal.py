"""Removal of models from disk while they may be served: unload them, remove their files, retry if they are in use."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
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


@dataclass
class CacheRemoval:
    """One request to remove models from disk."""

    services: Services
    request: Request
    query: RemoveAllQuery
    models: Sequence[CachedModelRecord]
    remove: Callable[..., Removal]
    """Removes the models. Takes `dry_run` and `released`, as `ModelManager.remove` does."""

    def __post_init__(self) -> None:
        self._registry = self.services.registry
        self._unloaded: list[ModelStatus] = []
        self._deadline = time.monotonic() + self.query.wait_s
        self._attempts_left = _UNLOAD_ATTEMPTS if self.query.unload else 1

    async def run(self) -> tuple[Removal, list[str]]:
        """Remove the models, or only plan it. Return what is removed, and the aliases that are unloaded for this."""
        if self.query.dry_run:
            return await self._dry_run()
        try:
            removal = await self._remove()
        except BaseException:
            self._serve_again(self._unloaded)
            raise
        self._serve_again(models_using(removal.kept, self._unloaded))
        return removal, _aliases(self._unloaded)

    async def _dry_run(self) -> tuple[Removal, list[str]]:
        unloaded = self._holders() if self.query.unload else []
        released = [Path(model.path) for model in self.models if model.path and models_using([model], unloaded)]
        try:
            removal = await self.services.in_disk_thread(partial(self.remove, dry_run=True, released=released))
        except ModelInUseError as error:
            raise self._explain(error) from error
        return removal, _aliases(unloaded)

    async def _remove(self) -> Removal:
        total: Removal | None = None
        while True:
            if self.query.unload:
                await self._unload()
            try:
                removal = await self.services.in_disk_thread(self.remove)
            except ModelInUseError as error:
                if not await self._should_retry():
                    raise self._explain(error) from error
                continue
            total = _combine(total, removal) if total is not None else removal
            if not total.kept or not await self._should_retry():
                return total

    def _holders(self) -> list[ModelStatus]:
        return models_using(self.models, self._registry.statuses())

    async def _unload(self) -> None:
        holders = self._holders()
        self._unloaded += holders
        for status in holders:
            alias = status.spec.alias
            if status.configured:
                await self.services.background.wait(self._registry.unload(alias, reason="its files are removed"))
            else:
                # Stop serving it, because the next request would download the files again.
                with suppress(ModelNotFoundError):
                    await self.services.background.wait(self._registry.remove(alias))

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
        await self.request.body()
        if await self.request.is_disconnected():
            raise ClientDisconnect
        self.services.background.raise_if_shutting_down()
        await asyncio.sleep(_RETRY_EVERY_S)
        return True

    def _explain(self, error: ModelInUseError) -> ModelInUseError:
        """Return the error with what the client can do about models of this service."""
        if not self.query.unload and (aliases := _aliases(self._holders())):
            return ModelInUseError(
                f"The model is loaded as {_quote(aliases)}. Nothing was removed. To unload it first, add unload=true "
                f"(`emb-provider rm --unload`), or POST /api/models/unload?model_name={aliases[0]}."
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
        if status.state in (State.UNLOADED, State.FAILED):
            return False
        if status.snapshot is None:
            return any(status.spec.name == model.model_name for model in models)
        used = {str(directory) for directory in status.snapshot.directories}
        return any(model.path in used for model in models)

    return [status for status in statuses if uses(status)]


def _combine(first: Removal, second: Removal) -> Removal:
    sums = {name: getattr(first, name) + getattr(second, name) for name in ("models", "artifacts", "freed")}
    return second.model_copy(update=sums)


def _aliases(statuses: Sequence[ModelStatus]) -> list[str]:
    return list(dict.fromkeys(status.spec.alias for status in statuses))


def _quote(aliases: Sequence[str]) -> str:
    return ", ".join(f"`{alias}`" for alias in aliases)
