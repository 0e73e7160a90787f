"""Which model a name means."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from emb_model_provider.model_spec import ModelSpec


def other_names(configured: Iterable[ModelSpec], added: Iterable[ModelSpec] = ()) -> dict[str, str]:
    """Map ids of models to the first alias that serves them, and last parts that mean just one model to its alias.

    A model that is added takes no name from those before it, nor makes one of theirs unclear: whoever uses it would get
    an error, or another model's vectors, from one request to the next.
    """
    names = _names_of(configured)
    for spec in added:
        names = _names_of([spec]) | names
    return {name: alias for name, alias in names.items() if alias is not None}


def _names_of(specs: Iterable[ModelSpec]) -> dict[str, str | None]:
    """The same for models none of which comes before another; None for what is unclear among them."""
    ids: dict[str, str] = {}
    last_parts: dict[str, set[str]] = {}
    for spec in specs:
        ids.setdefault(spec.name, spec.alias)
        for name in (spec.name, spec.alias):
            last_parts.setdefault(name.rstrip("/").rpartition("/")[2], set()).add(spec.alias)
    unique = {
        name: next(iter(aliases)) if len(aliases) == 1 else None for name, aliases in last_parts.items()
    }
    return {**unique, **ids}
