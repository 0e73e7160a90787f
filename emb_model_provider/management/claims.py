"""Having models alone, so that they can be removed."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from emb_model_provider.errors import ManagementError, ModelInUseError
from emb_model_provider.hubs.locks import claim
from emb_model_provider.hubs.storage import CACHE_SETTING, storage_error

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from contextlib import ExitStack

    from emb_model_provider.hubs.locks import Held
    from emb_model_provider.management.entries import CachedSnapshot
    from emb_model_provider.management.inventory import Inventory, Record


class Claims:
    """Has models and their artifacts alone, for as long as a stack stands."""

    def __init__(self, inventory: Inventory, stack: ExitStack, deadline: float) -> None:
        self._inventory = inventory
        self._stack = stack
        self._deadline = deadline
        self._taken: set[object] = set()

    def take(self, records: Sequence[Record], elsewhere: Collection[str]) -> None:
        """Claim what is not claimed yet. Raises: ModelInUseError, ManagementError."""
        inventory = self._inventory
        try:
            for record in records:
                entry = record.entry
                for lock in sorted({each.lock_path(inventory.manifest_dir) for each in record.questions}):
                    self._one(
                        entry, lock, partial(claim, lock),
                        "it is being fetched, or removed",
                    )  # fmt: skip
                if (path := entry.path) is not None:
                    self._one(
                        entry, path, partial(inventory.holds.claim, path),
                        "a process has loaded it, or is loading it",
                    )  # fmt: skip
                for key in artifacts_of(record, elsewhere):
                    self._one(
                        entry, key, partial(inventory.stock.claim, key),
                        "a process serves from what was compiled from it",
                    )  # fmt: skip
        except OSError as error:
            raise refused(error, inventory) from error

    def _one(self, entry: CachedSnapshot, what: object, take: Callable[..., Held | None], else_: str) -> None:
        if what in self._taken:
            return
        held = take(wait_s=max(0.0, self._deadline - time.monotonic()))
        if held is None:
            raise in_use(entry, else_)
        self._stack.enter_context(held)
        self._taken.add(what)


def artifacts_of(record: Record, elsewhere: Collection[str]) -> dict[str, int]:
    """The artifacts of a model, each with its size, that are not those of a model that stays."""
    return {
        artifact.key: artifact.size
        for artifact in record.entry.artifacts
        if artifact.snapshot not in elsewhere
    }


def in_use(entry: CachedSnapshot, how: str) -> ModelInUseError:
    return ModelInUseError(
        f"{entry.name} is in use: {how}. Nothing was removed. Unload it first (`emb-provider unload {entry.name}`), "
        "end the process that uses it, or wait for it (`--wait`)."
    )


def refused(error: OSError, inventory: Inventory) -> ManagementError:
    directory = inventory.manifest_dir.parent
    known = storage_error(error, directory, CACHE_SETTING)
    return ManagementError(known.message if known is not None else f"{directory} cannot be changed: {error}.")
