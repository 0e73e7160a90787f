"""Which model a name means."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from emb_model_provider.model_spec import ModelSpec


def other_names(specs: Iterable[ModelSpec]) -> dict[str, str]:
    """Map ids of models to the first alias that serves them, and last parts that mean just one model to its alias."""
    ids: dict[str, str] = {}
    last_parts: dict[str, set[str]] = {}
    for spec in specs:
        ids.setdefault(spec.name, spec.alias)
        for name in (spec.name, spec.alias):
            last_parts.setdefault(name.rstrip("/").rpartition("/")[2], set()).add(spec.alias)
    return {name: next(iter(aliases)) for name, aliases in last_parts.items() if len(aliases) == 1} | ids
