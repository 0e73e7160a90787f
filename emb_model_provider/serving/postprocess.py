"""From a backend's vectors to those a request asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from emb_model_provider.errors import DimensionsError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from emb_model_provider.backends.base import ModelDescription
    from emb_model_provider.model_spec import ModelSpec

_SMALLEST_NORM = np.float32(1e-12)
"""As in torch.nn.functional.normalize: a zero vector stays zero."""


def normalized(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
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


def finished(vectors: NDArray[np.float32], *, dimensions: int | None, normalize: bool) -> NDArray[np.float32]:
    """Cut vectors to `dimensions` and bring them to length 1 where asked; a cut vector always is."""
    if dimensions is not None:
        vectors = vectors[:, :dimensions]
    return normalized(vectors) if normalize or dimensions is not None else vectors
