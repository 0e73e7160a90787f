"""What a hub is to the rest of the package, and the table of those there are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from emb_model_provider.model_spec import HubName
    from emb_model_provider.progress import CancelToken, OnProgress
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


class Hub(Protocol):
    """Gets snapshots. One instance serves one fetch and is used from one thread."""

    def __init__(self, config: HubConfig) -> None: ...

    def fetch(
        self, repository: str, revision: str | None, on_progress: OnProgress, cancel: CancelToken
    ) -> Snapshot:
        """Download the files and return them as a complete, verified snapshot.

        Reusing earlier downloads, and the lock that keeps two processes from downloading at once, are the
        responsibility of `fetch.fetch_snapshot`.

        Args:
            repository: The id on the hub, or a directory for `local`.
            revision: Branch, tag or commit; None is the default branch.
            on_progress: Called from one thread at a time, not always the caller's.
            cancel: Ends the download soon after it is cancelled, even while the hub sends nothing.

        Raises:
            HubError: The message says what to do. With `config.offline` no request is sent, and a snapshot that is
                not on this machine is an OfflineError.
            OperationCancelledError: `cancel` was cancelled.
        """
        ...
