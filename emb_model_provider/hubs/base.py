"""The interface of the hubs, their configuration, and the table of all hubs."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, cast

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
"""Each hub's class, which is imported only if the hub is used."""

HubState = Literal["answers", "refuses", "lacks", "silent", "fails"]
"""How a hub responds. answers: it has the repository, and allows access; refuses: it requires a token, or rejects the one
that it was given; lacks: it has no such repository, or hides it; silent: it does not respond; fails: it responds with an
error of its own."""


@dataclass(frozen=True, slots=True)
class HubConfig:
    """How to reach one hub for one model. The model's own values take precedence over those of the settings."""

    cache_dir: Path | None
    """Where the hub's client keeps its downloads; None is the client's own convention."""
    manifest_dir: Path
    """Where this package keeps the manifests of snapshots."""
    endpoint: str | None = None
    token: str | None = field(default=None, repr=False)
    offline: bool = False
    include: tuple[str, ...] = ()
    """Patterns (fnmatch) of the files to download, among those that serving needs. Empty: all of them."""
    exclude: tuple[str, ...] = ()
    is_held: Callable[[Path], bool] = lambda _: False
    """Returns whether any process uses the snapshot in a directory now."""

    @property
    def partial(self) -> bool:
        """Whether only a part of the files that serving needs is requested."""
        return bool(self.include or self.exclude)


class Hub(Protocol):
    """Provides snapshots. One instance serves one download and is used from one thread."""

    def __init__(self, config: HubConfig) -> None: ...

    def fetch(self, repository: str, revision: str | None, on_progress: OnProgress, cancel: CancelToken) -> Snapshot:
        """Download the files and return them as a complete, verified snapshot.

        `fetch.fetch_snapshot` is responsible for reusing earlier downloads, and for the lock that keeps two processes
        from downloading at once.

        Args:
            repository: The id on the hub, or a directory for `local`.
            revision: Branch, tag or commit; None is the default branch.
            on_progress: Called from one thread at a time, not always the caller's. Raises OperationCancelledError if
                `cancel` was cancelled.
            cancel: Ends the download soon after it is cancelled, even while the hub sends nothing.

        Raises:
            HubError: The message says what to do. With `config.offline` no request is sent, and a snapshot that is
                not on this machine is an OfflineError.
            OperationCancelledError: `cancel` was cancelled.
        """
        ...


class RemoteHub(Hub, Protocol):
    """A hub that is reached through its own client."""

    @property
    def endpoint(self) -> str:
        """The URL that requests are sent to."""
        ...

    @property
    def token(self) -> str | None:
        """The token that is sent, which can be the client's own."""
        ...

    def check_token(self) -> None:
        """Ask the hub whose token it is; raises the client's error if that fails."""
        ...

    def check_repository(self, repository: str, timeout_s: float) -> None:
        """Ask the hub for a repository; raises the client's error if that fails."""
        ...

    def classify(self, error: Exception) -> HubState:
        """Return what an error of the client says about the hub."""
        ...


def create_hub(name: HubName, config: HubConfig) -> Hub:
    """Return a hub. Imports the hub's client only when it is used."""
    module, _, kind = HUBS[name].partition(":")
    return cast("Hub", getattr(importlib.import_module(module), kind)(config))
