"""Which of a model's prompts a request means."""

from __future__ import annotations

from typing import TYPE_CHECKING

from emb_model_provider.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

_SYNONYMS = (
    ("query", "search_query", "retrieval.query"),
    ("document", "passage", "search_document", "retrieval.passage", "corpus"),
)
"""What the APIs in use call the two sides of a search; each name stands for all of its line."""


def choose_prompt(input_type: str | None, prompts: Mapping[str, str], default: str | None) -> str:
    """Return the text to put before each input, empty for none.

    A name that is known but for which the model has no prompt changes nothing.

    Raises: RequestError for a name that neither the model nor the usual APIs know.
    """
    if input_type is not None:
        if input_type in prompts:
            return prompts[input_type]
        group = next((names for names in _SYNONYMS if input_type in names), None)
        if group is None:
            known = [*prompts, *(name for names in _SYNONYMS for name in names if name not in prompts)]
            supported = ", ".join(f"'{name}'" for name in known)
            raise RequestError(
                f"Invalid value for 'input_type' = {input_type[:100]!r}. Supported values: [{supported}].",
                param="input_type",
            )
        for name in group:
            if name in prompts:
                return prompts[name]
    return prompts.get(default, "") if default is not None else ""
