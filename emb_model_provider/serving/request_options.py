"""Options of a request: the prompt before its inputs, and the size and length of its vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from emb_model_provider.errors import DimensionsError, RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from emb_model_provider.backends.base import ModelDescription
    from emb_model_provider.model_spec import ModelSpec

_MIN_NORM = np.float32(1e-12)
"""As in torch.nn.functional.normalize, so that a zero vector stays zero."""
_PROMPT_SYNONYMS = (
    ("query", "search_query", "retrieval.query"),
    ("document", "passage", "search_document", "retrieval.passage", "corpus"),
)
"""Names of the two sides of a search in common APIs. The names of a line are interchangeable."""


def choose_prompt(input_type: str | None, prompts: Mapping[str, str], default: str | None) -> str:
    """Return the text to put before each input; empty for none.

    Args:
        input_type: The requested prompt: its name, or a synonym of `query` or `document`. None: the default.
        prompts: The prompts of the model.
        default: Name of the prompt that applies if none is requested, or if the model has none for the synonym.

    Raises:
        RequestError: Neither the model nor a common API knows the name.
    """
    if input_type is not None:
        if input_type in prompts:
            return prompts[input_type]
        group = next((names for names in _PROMPT_SYNONYMS if input_type in names), None)
        if group is None:
            known = [*prompts, *(name for names in _PROMPT_SYNONYMS for name in names if name not in prompts)]
            supported = ", ".join(f"'{name}'" for name in known)
            raise RequestError(
                f"Invalid value for 'input_type' = {input_type[:100]!r}. Supported values: [{supported}].",
                param="input_type",
            )
        for name in group:
            if name in prompts:
                return prompts[name]
    return prompts.get(default, "") if default is not None else ""


def check_dimensions(requested: int | None, description: ModelDescription, spec: ModelSpec) -> int | None:
    """Return the size to truncate vectors to, or None to keep their size.

    Raises:
        DimensionsError: Neither the model nor the settings allow the size.
    """
    native = description.dimension
    if requested is None or requested == native:
        return None
    declared, configured = description.matryoshka, spec.dimensions
    if (declared == "any" or configured == "any") and 1 <= requested < native:
        return requested
    sizes = {size for group in (declared, configured) if isinstance(group, tuple) for size in group if size < native}
    if requested in sizes:
        return requested
    if "any" in (declared, configured):
        raise DimensionsError(f"1 to {native}")
    raise DimensionsError(", ".join(str(size) for size in sorted({*sizes, native})))


def postprocess(vectors: NDArray[np.float32], *, dimensions: int | None, normalize: bool) -> NDArray[np.float32]:
    """Truncate and normalize vectors.

    Args:
        vectors: float32 of shape (inputs, dimension).
        dimensions: Size to truncate to; None keeps the size. Truncated vectors are always normalized.
        normalize: Whether to normalize vectors that are not truncated.

    Returns:
        float32 of shape (inputs, dimensions); the input itself if nothing is to be done.
    """
    if dimensions is not None:
        vectors = vectors[:, :dimensions]
    return l2_normalize(vectors) if normalize or dimensions is not None else vectors


def l2_normalize(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the rows of `vectors`, float32 of shape (inputs, dimension), scaled to length 1. Zero rows stay zero."""
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    np.maximum(norms, _MIN_NORM, out=norms)
    result: NDArray[np.float32] = vectors / norms[:, np.newaxis]
    return result
