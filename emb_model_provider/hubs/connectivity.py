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

RemoteHubName = Literal["huggingface", "modelscope"]
HubState = Literal["answers", "refuses", "lacks", "silent", "fails"]

KNOWN: Mapping[RemoteHubName, str] = {
    "huggingface": "sentence-transformers/all-MiniLM-L6-v2",
    "modelscope": "iic/nlp_gte_sentence-embedding_chinese-small",
}
"""A public repository of each hub, to ask for where no other is named."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HubStatus:
    """What came of asking a hub."""

    hub: RemoteHubName
    endpoint: str
    repository: str
    state: HubState
    """answers: it has the repository, and we may read it; refuses: it wants a token, or another one; lacks: it has no
    such repository, or hides it; silent: nothing came back in time; fails: it answers with an error of its own."""
    token: bool
    """Whether it was given one."""
    reason: str = ""
    """In a few words, without the token."""


def check_hub(
    hub: RemoteHubName, settings: HubSettings, *, repository: str | None = None, timeout_s: float = 10.0
) -> HubStatus:
    """Ask a hub who we are, where there is a token, and for a repository. Never takes longer than `timeout_s`.

    The clients try again by themselves for longer than anybody wants to wait for this: what has not come back by then
    goes on in the background, and ends with the process.
    """
    asked = repository or KNOWN[hub]
    found: list[HubStatus] = []
    ask = {"huggingface": _huggingface, "modelscope": _modelscope}[hub]
    thread = threading.Thread(
        target=lambda: found.append(ask(settings, asked, timeout_s)), name=f"reach-{hub}", daemon=True
    )
    thread.start()
    thread.join(timeout_s)
    if found:
        return found[0]
    return HubStatus(
        hub=hub,
        endpoint=settings.endpoint(hub) or "its usual address",
        repository=asked,
        state="silent",
        token=settings.token(hub) is not None,
        reason=f"no answer within {timeout_s:g} s",
    )


def _huggingface(settings: HubSettings, repository: str, timeout_s: float) -> HubStatus:
    from huggingface_hub import HfApi, errors, get_token

    api = HfApi(endpoint=settings.hf_endpoint, token=settings.token("huggingface"))
    token = settings.token("huggingface") or get_token()

    def judge(error: Exception) -> HubState:
        if not isinstance(error, errors.HfHubHTTPError):
            return "silent"
        status = error.response.status_code
        if isinstance(error, errors.GatedRepoError):
            return "refuses"
        # Without a right to see it, Hugging Face says 401 for a repository that there may not be.
        if isinstance(error, errors.RepositoryNotFoundError) or status == 404:
            return "lacks"
        return "refuses" if status in (401, 403) else "fails"

    asking = _Probe("huggingface", api.endpoint, repository, token, judge)
    return asking.ask(
        who=lambda: api.whoami(),
        repository=lambda: api.model_info(repository, revision="main", timeout=timeout_s),
    )


def _modelscope(settings: HubSettings, repository: str, timeout_s: float) -> HubStatus:  # noqa: ARG001 - as the other's
    logger = logging.getLogger("modelscope_hub")
    if not logger.handlers:  # else the client adds one of its own, which writes over ours
        logger.addHandler(logging.NullHandler())
    from modelscope_hub import HubApi, HubConfig, errors

    told: dict[str, Any] = {"endpoint": settings.modelscope_endpoint, "token": settings.token("modelscope")}
    given = {name: value for name, value in told.items() if value is not None}

    def judge(error: Exception) -> HubState:
        if isinstance(error, errors.AuthenticationError | errors.PermissionDeniedError):
            return "refuses"
        if isinstance(error, errors.NotExistError):
            return "lacks"
        return "fails" if isinstance(error, errors.APIError) else "silent"

    # The client makes its cache's directory, wherever that is, and nothing is to be fetched into it.
    with tempfile.TemporaryDirectory() as nowhere:
        config = HubConfig(cache_dir=Path(nowhere), **given)
        api = HubApi(config)
        asking = _Probe("modelscope", str(config.endpoint), repository, config.token, judge)
        return asking.ask(
            who=lambda: api.whoami(), repository=lambda: api.list_repo_revisions(repository, "model")
        )


class _Probe:
    """One hub's two questions, and what their failures mean."""

    def __init__(
        self,
        hub: RemoteHubName,
        endpoint: str,
        repository: str,
        token: str | None,
        judge: Callable[[Exception], HubState],
    ) -> None:
        self._hub: RemoteHubName = hub
        self._endpoint = endpoint
        self._repository = repository
        self._token = token
        self._judge = judge

    def ask(self, *, who: Callable[[], object], repository: Callable[[], object]) -> HubStatus:
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

    def _found(self, state: HubState, reason: str = "") -> HubStatus:
        return HubStatus(
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
