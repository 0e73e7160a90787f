"""The interface of the hubs, the table of all hubs, and a check whether one is reachable."""

from __future__ import annotations

import difflib
import importlib
import logging
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, cast

from emb_model_provider.formatting import first_line
from emb_model_provider.snapshots.files import use_temporary_directory
from emb_model_provider.snapshots.manifest import ALL_FILES

if TYPE_CHECKING:
    from emb_model_provider.model_spec import HubName
    from emb_model_provider.progress import CancelToken, OnProgress
    from emb_model_provider.settings import HubSettings
    from emb_model_provider.settings.fields import RemoteHubName
    from emb_model_provider.snapshots.manifest import FilePatterns
    from emb_model_provider.snapshots.snapshot import Snapshot

logger = logging.getLogger(__name__)

HUBS: dict[HubName, str] = {
    "huggingface": "emb_model_provider.hubs.huggingface:HuggingFaceHub",
    "modelscope": "emb_model_provider.hubs.modelscope:ModelScopeHub",
    "local": "emb_model_provider.hubs.local:LocalHub",
    "bundled": "emb_model_provider.hubs.local:BundledHub",
}
"""Each hub's class, which is imported only if the hub is used."""

PUBLIC_REPOSITORIES: dict[RemoteHubName, str] = {
    "huggingface": "sentence-transformers/all-MiniLM-L6-v2",
    "modelscope": "iic/nlp_gte_sentence-embedding_chinese-small",
}

HubState = Literal["answers", "refuses", "lacks", "silent", "fails"]
"""How a hub responds. answers: it has the repository, and allows access; refuses: it requires a token, or rejects the one
that it was given; lacks: it has no such repository, or hides it; silent: it does not respond; fails: it responds with an
error of its own."""

_MAX_REASON_CHARS = 160
_MAX_SEARCH_RESULTS = 20
_MAX_SUGGESTIONS = 3


@dataclass(frozen=True, slots=True)
class HubConfig:
    """How to reach one hub for one model. The model's own values take precedence over those of the settings."""

    cache_dir: Path | None
    """Where the hub's client keeps its downloads; None is the client's own convention."""
    manifest_dir: Path
    """Where this package keeps the manifests of snapshots, in its cache directory."""
    endpoint: str | None = None
    token: str | None = field(default=None, repr=False)
    offline: bool = False
    patterns: FilePatterns = ALL_FILES


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


class RemoteHub(Hub, Protocol):
    """A hub that is reached through its own client."""

    @property
    def endpoint(self) -> str: ...

    @property
    def token(self) -> str | None:
        """The token that is sent, which can be the client's own."""

    def check_token(self) -> None:
        """Ask the hub whose token it is; raises the client's error if that fails."""

    def check_repository(self, repository: str, timeout_s: float) -> None:
        """Ask the hub for a repository; raises the client's error if that fails."""

    def search(self, text: str, limit: int) -> list[str]:
        """Return the ids of repositories whose name contains a text, the most downloaded first."""

    def classify(self, error: Exception) -> HubState:
        """Return what an error of the client says about the hub."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubStatus:
    """The result of a check."""

    hub: RemoteHubName
    endpoint: str
    repository: str
    state: HubState
    token: bool
    """Whether a token was sent."""
    reason: str = ""
    """The error in a few words, without the token."""


def create_hub(name: HubName, config: HubConfig) -> Hub:
    """Return a hub. Imports the hub's client only when it is used."""
    module, _, kind = HUBS[name].partition(":")
    return cast("Hub", getattr(importlib.import_module(module), kind)(config))


def similar_repositories(remote: RemoteHub, repository: str) -> list[str]:
    """Return repositories of a hub that could be meant by the name of one that it does not have.

    Empty also if the hub does not answer, because the result is only a hint in the message of another error.
    """
    owner, _, name = repository.rpartition("/")
    # The names of models on disk over HTTP have an underscore in place of the slash.
    candidates = [name] if owner or "_" not in name else [name, name.partition("_")[2]]
    found: list[str] = []
    for text in candidates:
        try:
            found += remote.search(text, _MAX_SEARCH_RESULTS)
        except Exception as error:  # noqa: BLE001 - the clients raise errors of several libraries
            logger.debug("Could not search for %s: %s", text, type(error).__name__)
            break
    # A repository of another owner with the same name comes first, then similar names.
    same = [each for each in found if each.rpartition("/")[2].casefold() in (text.casefold() for text in candidates)]
    close = difflib.get_close_matches(repository, found, n=_MAX_SUGGESTIONS)
    return list(dict.fromkeys([*same, *close]))[:_MAX_SUGGESTIONS]


def check_hub(
    hub: RemoteHubName, settings: HubSettings, *, repository: str | None = None, timeout_s: float = 10.0
) -> HubStatus:
    """Ask a hub whose token it is, if there is one, and for a repository, or for a public one.

    The clients retry for a long time. A check that has not ended after `timeout_s` seconds goes on in the background,
    and ends with the process.
    """
    requested = repository or PUBLIC_REPOSITORIES[hub]
    silent = HubStatus(
        hub=hub,
        endpoint=settings.endpoint(hub) or "its default endpoint",
        repository=requested,
        state="silent",
        token=settings.token(hub) is not None,
        reason=f"no answer within {timeout_s:g} s",
    )
    results = [silent]
    thread = threading.Thread(
        target=lambda: results.append(_check(hub, settings, requested, timeout_s)), name=f"check-{hub}", daemon=True
    )
    thread.start()
    thread.join(timeout_s)
    return results[-1]


def _check(hub: RemoteHubName, settings: HubSettings, repository: str, timeout_s: float) -> HubStatus:
    use_temporary_directory(settings.cache_dir)
    # ModelScope's client creates its cache directory, although nothing is downloaded into it.
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = HubConfig(directory, directory, endpoint=settings.endpoint(hub), token=settings.token(hub))
        remote = cast("RemoteHub", create_hub(hub, config))
        state, reason = _ask(remote, repository, timeout_s)
        token = bool(remote.token)
        return HubStatus(
            hub=hub, endpoint=remote.endpoint, repository=repository, state=state, token=token, reason=reason
        )


def _ask(remote: RemoteHub, repository: str, timeout_s: float) -> tuple[HubState, str]:
    if remote.token:
        try:
            remote.check_token()
        except Exception as error:  # noqa: BLE001 - the clients raise errors of several libraries
            # A mirror need not know the owner of a token: only a rejection counts.
            if remote.classify(error) == "refuses":
                return "refuses", "the token is not valid"
    try:
        # A longer timeout than that of `check_hub`, so that the reason is the same for all hubs.
        remote.check_repository(repository, 2 * timeout_s)
    except Exception as error:  # noqa: BLE001 - likewise
        return remote.classify(error), first_line(error, limit=_MAX_REASON_CHARS, secret=remote.token)
    return "answers", ""
