"""Which of the models on disk a name means."""

from __future__ import annotations

import contextlib
import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from emb_model_provider.errors import AmbiguousNameError, NotCachedError
from emb_model_provider.hubs.caches import all_in
from emb_model_provider.management.inventory import CLIENTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from emb_model_provider.management.inventory import Inventory, Record
    from emb_model_provider.model_spec import Source
    from emb_model_provider.settings import Settings


def find(
    inventory: Inventory,
    settings: Settings,
    name: str,
    *,
    source: Source | None = None,
    revision: str | None = None,
) -> list[Record]:
    """Return the models that a name means, at a hub or a revision where those are given.

    An alias of the settings means the hub and the revision that they give it, where nothing else is asked for.

    Raises: NotCachedError, which names what is there; AmbiguousNameError where an id is that of several models.
    """
    records = inventory.records()
    asked, rev = name, revision
    spec = next((each for each in settings.models().specs if each.alias == name != each.name), None)
    if spec is not None:
        asked, rev = str(spec.path) if spec.path is not None else spec.name, revision or spec.revision
    found = [record for record in _named(settings, asked, records) if _is(record, source, rev)]
    if spec is not None and source is None:
        found = [each for each in found if each.entry.hub == spec.source] or found
    if found:
        return found
    known = {record.entry.path for record in records}
    for hub in CLIENTS:
        there_as = settings.hubs().name_on(hub, asked)
        for root in inventory.roots(hub) if source in (None, "auto", hub) else ():
            there = (
                each for each in all_in(hub, root) if each.repository == there_as and each.path not in known
            )
            if other := next(there, None):
                raise NotCachedError(
                    f"{name} lies in {other.path}, but another program put it there: it is neither verified nor "
                    f"removed. `emb-provider pull {name}` verifies it, and takes it over without fetching it again."
                )
    raise NotCachedError(_not_cached(name, source, revision, records))


def _named(settings: Settings, name: str, records: Sequence[Record]) -> list[Record]:
    """By its own name, else as one part of a path, else by its last part. Raises: AmbiguousNameError."""
    hubs = settings.hubs()
    with contextlib.suppress(OSError, RuntimeError):
        directory = str(Path(name).expanduser().absolute())
        if local := [r for r in records if r.entry.hub == "local" and r.entry.name == directory]:
            return local
    if own := [r for r in records if r.entry.name in (name, hubs.name_on(r.entry.hub, name))]:
        return own
    if by_id := [r for r in records if r.entry.id == name]:
        if len(names := sorted({r.entry.name for r in by_id})) > 1:
            raise AmbiguousNameError(
                f"{name} can be any of {', '.join(names)}. Say which, with its slash (over HTTP a slash is %2F)."
            )
        return by_id
    last = [r for r in records if r.entry.name.rstrip("/").rpartition("/")[2] == name]
    return last if len({r.entry.name for r in last}) == 1 else []


def _is(record: Record, source: Source | None, revision: str | None) -> bool:
    if source not in (None, "auto", record.entry.hub):
        return False
    if revision is None:
        return True
    resolved = record.entry.revision or ""
    asked = {question.revision for question in record.questions}
    return revision in asked or revision == resolved or (len(revision) >= 7 and resolved.startswith(revision))


def _not_cached(name: str, source: Source | None, revision: str | None, records: Sequence[Record]) -> str:
    what = f"{name}{f'@{revision}' if revision else ''}{f' from {source}' if source else ''}"
    names = list(dict.fromkeys(record.entry.name for record in records))
    if not names:
        return f"{what} is not on this machine, nor is any other model. Fetch it with `emb-provider pull {name}`."
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.3) or names[:5]
    more = "" if len(names) <= len(close) else f", and {len(names) - len(close)} more"
    return (
        f"{what} is not on this machine. There are: {', '.join(close)}{more} (`emb-provider list`). "
        f"Fetch it with `emb-provider pull {name}`."
    )
