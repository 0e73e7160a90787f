"""Serves embedding models from ModelScope, Hugging Face or a directory, over HTTP and in Python programs.

`Embedder` runs a model in this process. `ModelManager` and `get_model_manager` download, list, verify and remove
models. `Transfer` copies repositories from one hub to another.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emb_model_provider.embedder import Embedder
    from emb_model_provider.management.manager import ModelManager, get_model_manager
    from emb_model_provider.transfer.session import TransferOptions
    from emb_model_provider.transfer.transfer import Transfer

__all__ = ["Embedder", "ModelManager", "Transfer", "TransferOptions", "get_model_manager"]

_MODULES = {
    "Embedder": "emb_model_provider.embedder",
    "ModelManager": "emb_model_provider.management.manager",
    "Transfer": "emb_model_provider.transfer.transfer",
    "TransferOptions": "emb_model_provider.transfer.session",
    "get_model_manager": "emb_model_provider.management.manager",
}
"""Modules of the public names. Imported at first use, because the supervisor and the command line need none of them."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
