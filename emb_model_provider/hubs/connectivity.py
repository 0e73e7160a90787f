"""Whether a hub answers, and takes the token it is given: asked through its own client, before a fetch needs it."""

from __future__ import annotations

import logging
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from emb_model_provider.settings import HubSettings

HubToReach = Literal["huggingface", "modelscope"]
ReachState = Literal["answers", "refuses", "lacks", "silent", "fails"]

KNOWN: Mapping[HubToReach, str] = {
    "huggingface": "sentence-transformers/all-MiniLM-L6-v2",
    "modelscope": "iic/nlp_gte_sentence-embedding_chinese-small",
}
"""A public repository of each hub, to ask for where no other is named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What came of asking a hub."""

    hub: HubToReach
    endpoint: str
    repository: str
    state: ReachState
    """answers: it has the repository, and we may read it; refuses: it wants a token, or another one; lacks: it has no
    such repository, or hides it; silent: nothing came back in time; fails: it answers with an error of its own."""
    token: bool
    """Whether it was given one."""
    reason: str = ""
    """In a few words, without the token."""


def reach(
    hub: HubToReach, settings: HubSettings, *, repository: str | None = None, timeout_s: float = 10.0
) -> Reach:
    """Ask a hub who we are, where there is a token, and for a repository. Never takes longer than `timeout_s`.

    The clients try again by themselves for longer than anybody wants to wait for this: what has not come back by then
    goes on in the background, and ends with the process.
    """
    asked = repository or KNOWN[hub]
    found: list[Reach] = []
    ask = {"huggingface": _huggingface, "modelscope": _modelscope}[hub]
    thread = threading.Thread(
        target=lambda: found.append(ask(settings, asked, timeout_s)), name=f"reach-{hub}", daemon=True
    )
    thread.start()
    thread.join(timeout_s)
    if found:
        return found[0]
    endpoint, token = {
        "huggingface": (settings.hf_endpoint, settings.hf_token),
        "modelscope": (settings.modelscope_endpoint, settings.modelscope_token),
    }[hub]
    return Reach(
        hub=hub,
        endpoint=endpoint or "its usual address",
        repository=asked,
        state="silent",
        token=bool(token),
        reason=f"no answer within {timeout_s:g} s",
    )


def _huggingface(settings: HubSettings, repository: str, timeout_s: float) -> Reach:
    from huggingface_hub import HfApi, errors, get_token

    api = HfApi(endpoint=settings.hf_endpoint, token=settings.hf_token)
    token = settings.hf_token or get_token()

    def judge(error: Exception) -> ReachState:
        if not isinstance(error, errors.HfHubHTTPError):
            return "silent"
        status = error.response.status_code
        if isinstance(error, errors.GatedRepoError):
            return "refuses"
        # Without a right to see it, Hugging Face says 401 for a repository that there may not be.
        if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
            return "lacks"
        return "refuses" if status in (401, 403) else "fails"

    asking = _Asking("huggingface", api.endpoint, repository, token, judge)
    return asking.ask(
        who=lambda: api.whoami(),
        repository=lambda: api.model_info(repository, revision="main", timeout=timeout_s),
    )


def _modelscope(settings: HubSettings, repository: str, timeout_s: float) -> Reach:  # noqa: ARG001 - as the other's
    logger = logging.getLogger("modelscope_hub")
    if not logger.handlers:  # else the client adds one of its own, which writes over ours
        logger.addHandler(logging.NullHandler())
    from modelscope_hub import HubApi, HubConfig, errors

    told: dict[str, Any] = {"endpoint": settings.modelscope_endpoint, "token": settings.modelscope_token}
    given = {name: value for name, value in told.items() if value is not None}

    def judge(error: Exception) -> ReachState:
        if isinstance(error, errors.AuthenticationError | errors.PermissionDeniedError):
            return "refuses"
        if isinstance(error, errors.NotExistError):
            return "lacks"
        return "fails" if isinstance(error, errors.APIError) else "silent"

    # The client makes its cache's directory, wherever that is, and nothing is to be fetched into it.
    with tempfile.TemporaryDirectory() as nowhere:
        config = HubConfig(cache_dir=Path(nowhere), **given)
        api = HubApi(config)
        asking = _Asking("modelscope", str(config.endpoint), repository, config.token, judge)
        return asking.ask(
            who=lambda: api.whoami(), repository=lambda: api.list_repo_revisions(repository, "model")
        )


class _Asking:
    """One hub's two questions, and what their failures mean."""

    def __init__(
        self,
        hub: HubToReach,
        endpoint: str,
        repository: str,
        token: str | None,
        judge: Callable[[Exception], ReachState],
    ) -> None:
        self._hub: HubToReach = hub
        self._endpoint = endpoint
        self._repository = repository
        self._token = token
        self._judge = judge

    def ask(self, *, who: Callable[[], object], repository: Callable[[], object]) -> Reach:
        if self._token:
            try:
                who()
            except Exception as error:  # noqa: BLE001 (the clients raise from many libraries; all are judged)
                # A mirror need not know whose token it is; only a refusal counts.
                if self._judge(error) == "refuses":
                    return self._found("refuses", "the token is not valid")
        try:
            repository()
        except Exception as error:  # noqa: BLE001 (the same)
            return self._found(self._judge(error), self._line(error))
        return self._found("answers")

    def _found(self, state: ReachState, reason: str = "") -> Reach:
        return Reach(
            hub=self._hub,
            endpoint=self._endpoint,
            repository=self._repository,
            state=state,
            token=bool(self._token),
            reason=reason,
        )

    def _line(self, error: Exception) -> str:
        line = next(iter(str(error).strip().splitlines()), "")[:160] or type(error).__name__
        return line.replace(self._token, "***") if self._token else line
