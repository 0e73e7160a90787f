"""Choosing a backend and loading a snapshot into it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from emb_model_provider.backends.quiet_imports import quiet_imports
from emb_model_provider.errors import LoadError

if TYPE_CHECKING:
    from emb_model_provider.backends.base import Backend
    from emb_model_provider.hubs.snapshot import Snapshot
    from emb_model_provider.model_spec import BackendName, ModelSpec

BACKENDS: dict[BackendName, str] = {
    "torch": "emb_model_provider.backends.torch_backend:TorchBackend",
}
"""Name of a backend to its class, imported only when chosen: torch alone takes seconds to import."""


def load_backend(spec: ModelSpec, snapshot: Snapshot, *, trust_remote_code: bool) -> Backend:
    """Load a snapshot as `spec` asks. Call it on the thread that will own the backend.

    Raises: a `LoadError` of `emb_model_provider.errors`, whose message says what to do.
    """
    name: BackendName = "torch" if spec.backend == "auto" else spec.backend
    if name not in BACKENDS:
        raise LoadError(
            f"EMB_PROVIDER_BACKEND={name} is not there yet (model {spec.alias!r}). "
            f"Use one of: auto, {', '.join(BACKENDS)}."
        )
    module, _, attribute = BACKENDS[name].partition(":")
    with quiet_imports():
        backend_class = getattr(import_module(module), attribute)
    backend: Backend = backend_class(spec, snapshot, trust_remote_code=trust_remote_code)
    return backend
