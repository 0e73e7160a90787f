"""Checks whether a hub is reachable and accepts its token, before a download needs it."""

from __future__ import annotations

import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from emb_model_provider.formatting import first_line
from emb_model_provider.hubs.base import HubConfig, HubState, create_hub
from emb_model_provider.settings.fields import RemoteHubName

if TYPE_CHECKING:
    from collections.abc import Mapping

    from emb_model_provider.hubs.base import RemoteHub
    from emb_model_provider.settings import HubSettings

__all__ = ["KNOWN", "HubState", "HubStatus", "RemoteHubName", "check_hub"]

KNOWN: Mapping[RemoteHubName, str] = {
    "huggingface": "sentence-transformers/all-MiniLM-L6-v2",
    "modelscope": "iic/nlp_gte_sentence-embedding_chinese-small",
}
"""A public repository of each hub, which is requested if no other is named."""

_MAX_REASON_CHARS = 160


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


def check_hub(
    hub: RemoteHubName, settings: HubSettings, *, repository: str | None = None, timeout_s: float = 10.0
) -> HubStatus:
    """Ask a hub whose token it is, if there is one, and for a repository.

    The clients retry for a long time. A check that has not ended after `timeout_s` seconds goes on in the background,
    and ends with the process.

    Args:
        hub: The hub.
        settings: How the hubs are reached.
        repository: The repository; None is one that is public.
        timeout_s: Longest duration of the check in seconds.
    """
    requested = repository or KNOWN[hub]
    results: list[HubStatus] = []
    thread = threading.Thread(
        target=lambda: results.append(_probe(hub, settings, requested, timeout_s)), name=f"check-{hub}", daemon=True
    )
    thread.start()
    thread.join(timeout_s)
    if results:
        return results[0]
    return HubStatus(
        hub=hub,
        endpoint=settings.endpoint(hub) or "its default endpoint",
        repository=requested,
        state="silent",
        token=settings.token(hub) is not None,
        reason=f"no answer within {timeout_s:g} s",
    )


def _probe(hub: RemoteHubName, settings: HubSettings, repository: str, timeout_s: float) -> HubStatus:
    # ModelScope's client creates its cache directory, although nothing is downloaded into it.
    with tempfile.TemporaryDirectory() as directory:
        config = HubConfig(
            cache_dir=Path(directory),
            manifest_dir=Path(directory),
            endpoint=settings.endpoint(hub),
            token=settings.token(hub),
        )
        remote = cast("RemoteHub", create_hub(hub, config))
        state, reason = _ask(remote, repository, timeout_s)
        return HubStatus(
            hub=hub,
            endpoint=remote.endpoint,
            repository=repository,
            state=state,
            token=bool(remote.token),
            reason=reason,
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
        remote.check_repository(repository, timeout_s)
    except Exception as error:  # noqa: BLE001 - likewise
        return remote.classify(error), first_line(error, limit=_MAX_REASON_CHARS, secret=remote.token)
    return "answers", ""
