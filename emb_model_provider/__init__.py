"""Embedding models from ModelScope, Hugging Face or a directory: a service, and its parts for Python programs.

`Embedder` is a model in this process; `ModelManager` and `get_model_manager` fetch, list, check and remove models.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emb_model_provider.embedder import Embedder
    from emb_model_provider.management.manager import ModelManager, get_model_manager

__all__ = ["Embedder", "ModelManager", "get_model_manager"]

_PLACES = {
    "Embedder": "emb_model_provider.embedder",
    "ModelManager": "emb_model_provider.management.manager",
    "get_model_manager": "emb_model_provider.management.manager",
}
"""Imported when they are first asked for: the supervisor and the shell import this package, and need none of them."""


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)
