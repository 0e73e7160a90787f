"""What a hub is to the rest of the package, and the table of those there are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.model_spec import HubName
    from emb_model_provider.snapshots.snapshot import Snapshot

HUBS: dict[HubName, str] = {
    "huggingface": "emb_model_provider.hubs.huggingface:HuggingFaceHub",
    "modelscope": "emb_model_provider.hubs.modelscope:ModelScopeHub",
    "local": "emb_model_provider.hubs.local:LocalHub",
    "bundled": "emb_model_provider.hubs.local:BundledHub",
}
"""Name of a hub to the class that speaks to it, imported only when chosen."""


@dataclass(frozen=True, slots=True)
class HubConfig:
    """How to reach one hub for one model: the model's own values over those of the settings."""

    cache_dir: Path | None
    """Where the hub's client keeps its downloads; None is the client's own convention."""
    manifest_dir: Path
    """Where this package keeps the manifests of snapshots."""
    endpoint: str | None = None
    token: str | None = field(default=None, repr=False)
    offline: bool = False
    include: tuple[str, ...] = ()
    """Patterns (fnmatch) of the files to fetch, among those that serving needs; none is all of them."""
    exclude: tuple[str, ...] = ()
    is_held: Callable[[Path], bool] = lambda _: False
    """Whether any process uses the snapshot in a directory now."""

    @property
    def partial(self) -> bool:
        """Whether only a part of what serving needs was asked for."""
        return bool(self.include or self.exclude)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a fetch has come."""

    phase: Literal["resolve", "download", "verify"]
    repository: str
    done_bytes: int = 0
    """Over all files together; steps back when a file is started again."""
    total_bytes: int | None = None


class Hub(Protocol):
    """Gets snapshots. One instance serves one fetch and is used from one thread."""

    def __init__(self, config: HubConfig) -> None: ...

    def fetch(
        self, repository: str, revision: str | None, on_progress: Callable[[Progress], None]
    ) -> Snapshot:
        """Bring the files here and return them as a complete, verified snapshot.

        `repository` is the hub's id, or a directory for `local`. `revision` None is the hub's default
        branch. With `config.offline` no request is made: a snapshot comes from this machine or not at all.
        `on_progress` is called from one thread at a time, though not always the caller's. It may raise
        FetchCancelledError: then the fetch ends soon, with that error.

        What was fetched before, and the lock that keeps two processes from doing this at once, are the
        business of `fetch.fetch_snapshot`.

        Raises: a `HubError` of `emb_model_provider.errors`, whose message says what to do.
        """
        ...
