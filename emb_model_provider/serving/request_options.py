"""From a backend's vectors to those a request asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from emb_model_provider.errors import DimensionsError, RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import ModelDescription
    from emb_model_provider.model_spec import ModelSpec


_SMALLEST_NORM = np.float32(1e-12)
"""As in torch.nn.functional.normalize: a zero vector stays zero."""


def l2_normalize(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the rows of `vectors`, float32 of shape (inputs, dimension), at length 1; zero rows stay zero."""
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    np.maximum(norms, _SMALLEST_NORM, out=norms)
    result: NDArray[np.float32] = vectors / norms[:, np.newaxis]
    return result


def check_dimensions(requested: int | None, description: ModelDescription, spec: ModelSpec) -> int | None:
    """Return the size to cut vectors to, or None to leave them whole.

    Raises: DimensionsError where neither the model nor the operator allows the size.
    """
    native = description.dimension
    if requested is None or requested == native:
        return None
    declared, granted = description.matryoshka, spec.dimensions
    if (declared == "any" or granted == "any") and 1 <= requested < native:
        return requested
    sizes = {
        size for group in (declared, granted) if isinstance(group, tuple) for size in group if size < native
    }
    if requested in sizes:
        return requested
    if "any" in (declared, granted):
        raise DimensionsError(f"1 to {native}")
    raise DimensionsError(", ".join(str(size) for size in sorted({*sizes, native})))


def postprocess(
    vectors: NDArray[np.float32], *, dimensions: int | None, normalize: bool
) -> NDArray[np.float32]:
    """Cut vectors to `dimensions` and bring them to length 1 where asked; a cut vector always is."""
    if dimensions is not None:
        vectors = vectors[:, :dimensions]
    return l2_normalize(vectors) if normalize or dimensions is not None else vectors


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
