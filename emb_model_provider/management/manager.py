"""The manager of models on disk: the one that the service, the shell, HTTP and Python programs use."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from emb_model_provider.hubs.base import Progress
    from emb_model_provider.hubs.snapshot import Snapshot
    from emb_model_provider.management.entries import CachedSnapshot, Removal, Verification
    from emb_model_provider.management.holds import SnapshotHold
    from emb_model_provider.model_spec import ModelSpec, Precision, Source
    from emb_model_provider.settings import Settings


class CachedModelInfo(TypedDict):
    """One line of `list_cached_models`."""

    model_name: str
    id: str
    source: str
    revision: str | None
    path: str | None
    size: int
    """Bytes, artifacts included."""
    state: str
    last_used: str | None
    """ISO 8601, UTC."""
    in_use: bool


class ModelManager:
    """Models on disk, across hubs. Safe to use from several threads and processes at a time."""

    def __init__(self, settings: Settings, *, source: Source | None = None) -> None: ...

    # --- fetching -------------------------------------------------------------------------------------

    def ensure(
        self,
        spec: ModelSpec,
        *,
        force: bool = False,
        on_progress: Callable[[Progress], None] = lambda _: None,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
    ) -> Snapshot: ...

    def acquire(
        self, spec: ModelSpec, on_progress: Callable[[Progress], None] = lambda _: None
    ) -> tuple[Snapshot, SnapshotHold]: ...

    def copy_to(self, snapshot: Snapshot, directory: Path) -> Path: ...

    def compile(
        self,
        spec: ModelSpec,
        *,
        on_progress: Callable[[Progress], None] = lambda _: None,
        on_compiling: Callable[[], None] = lambda: None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> CompiledModel: ...

    # --- looking --------------------------------------------------------------------------------------

    def list(self, *, everything: bool = False) -> list[CachedSnapshot]: ...

    def find(
        self, name: str, *, source: Source | None = None, revision: str | None = None
    ) -> list[CachedSnapshot]: ...

    def inspect(self, snapshot: CachedSnapshot) -> dict[str, Any]: ...

    def verify(self, snapshot: CachedSnapshot) -> Verification: ...

    # --- removing -------------------------------------------------------------------------------------

    def remove(
        self,
        name: str,
        *,
        source: Source | None = None,
        revision: str | None = None,
        wait_s: float = 0.0,
        dry_run: bool = False,
    ) -> Removal: ...

    def remove_all(self, *, wait_s: float = 0.0, dry_run: bool = False) -> Removal: ...

    def prune(self, *, dry_run: bool = False) -> Removal: ...

    # --- for Python programs --------------------------------------------------------------------------

    def ensure_model_cached(
        self,
        name: str,
        *,
        source: Source | None = None,
        revision: str | None = None,
        force: bool = False,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        local_dir: Path | str | None = None,
    ) -> Path: ...

    def list_cached_models(self) -> list[CachedModelInfo]: ...

    def evict_model(self, name: str, *, wait_s: float = 0.0) -> Removal: ...

    def load_model_and_tokenizer(
        self, name: str, *, precision: Precision | None = None, device: str | None = None
    ) -> tuple[Any, Any]: ...
