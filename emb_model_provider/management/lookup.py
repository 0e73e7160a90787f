"""Finds the models on disk that a name refers to."""

from __future__ import annotations

import contextlib
import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from emb_model_provider.errors import AmbiguousNameError, NotCachedError
from emb_model_provider.hubs.caches import REMOTE_HUBS, scan_cache

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emb_model_provider.management.inventory import CacheEntry, CacheInfo, Inventory
    from emb_model_provider.model_spec import Source
    from emb_model_provider.settings import Settings


def find(
    info: CacheInfo,
    inventory: Inventory,
    settings: Settings,
    name: str,
    *,
    source: Source | None = None,
    revision: str | None = None,
) -> list[CacheEntry]:
    """Return the models on disk that a name refers to.

    Args:
        info: What is on disk.
        inventory: The caches, to find a model that another program has downloaded.
        settings: The settings, whose aliases are names too.
        name: A repository id, a directory, an alias, an `id`, or the last part of a name that only one model has.
        source: Only models from this hub. By default an alias refers to the hub that the settings give it.
        revision: Only this revision, as it was requested or as it was resolved.

    Raises:
        NotCachedError: There is none; the message names models that exist.
        AmbiguousNameError: An id is that of several models.
    """
    requested, requested_revision = name, revision
    spec = next((each for each in settings.models.specs() if each.alias == name != each.name), None)
    if spec is not None:
        requested = str(spec.path) if spec.path is not None else spec.name
        requested_revision = revision or spec.revision
    found = [
        entry for entry in _by_name(settings, requested, info.entries) if _matches(entry, source, requested_revision)
    ]
    if spec is not None and source is None:
        found = [entry for entry in found if entry.hub == spec.source] or found
    if found:
        return found
    _raise_if_unverified(info, inventory, settings, name, requested, source)
    raise NotCachedError(_not_cached(name, source, revision, info.entries))


def _by_name(settings: Settings, name: str, entries: Sequence[CacheEntry]) -> list[CacheEntry]:
    """Match the directory or the full name first, then the id, then the last part of the name."""
    with contextlib.suppress(OSError, RuntimeError):
        directory = str(Path(name).expanduser().absolute())
        if local := [entry for entry in entries if entry.hub == "local" and entry.name == directory]:
            return local
    hubs = settings.hubs
    if exact := [entry for entry in entries if entry.name in (name, hubs.name_on(entry.hub, name))]:
        return exact
    if by_id := [entry for entry in entries if entry.id == name]:
        if len(names := sorted({entry.name for entry in by_id})) > 1:
            raise AmbiguousNameError(
                f"{name} can be any of {', '.join(names)}. Write the full name with its slash (over HTTP a slash is "
                "%2F)."
            )
        return by_id
    last = [entry for entry in entries if entry.name.rstrip("/").rpartition("/")[2] == name]
    return last if len({entry.name for entry in last}) == 1 else []


def _matches(entry: CacheEntry, source: Source | None, revision: str | None) -> bool:
    if source not in (None, "auto", entry.hub):
        return False
    if revision is None:
        return True
    resolved = entry.revision or ""
    return (
        revision == resolved
        or revision in {key.revision for key in entry.keys}
        or (len(revision) >= 7 and resolved.startswith(revision))
    )


def _raise_if_unverified(
    info: CacheInfo, inventory: Inventory, settings: Settings, name: str, requested: str, source: Source | None
) -> None:
    known = {entry.path for entry in info.entries}
    for hub in REMOTE_HUBS:
        if source not in (None, "auto", hub):
            continue
        name_on_hub = settings.hubs.name_on(hub, requested)
        for root in inventory.roots(hub):
            for found in scan_cache(hub, root):
                if found.repository == name_on_hub and found.path not in known:
                    raise NotCachedError(
                        f"{name} is in {found.path}, but another program downloaded it: it is neither verified nor "
                        f"removed. `emb-provider pull {name}` verifies and adopts it without another download."
                    )


def _not_cached(name: str, source: Source | None, revision: str | None, entries: Sequence[CacheEntry]) -> str:
    what = f"{name}{f'@{revision}' if revision else ''}{f' from {source}' if source else ''}"
    names = list(dict.fromkeys(entry.name for entry in entries))
    if not names:
        return f"{what} is not on this machine, and no other model is. Download it with `emb-provider pull {name}`."
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.3) or names[:5]
    more = "" if len(names) <= len(close) else f", and {len(names) - len(close)} more"
    return (
        f"{what} is not on this machine. Available: {', '.join(close)}{more} (`emb-provider list`). "
        f"Download it with `emb-provider pull {name}`."
    )
