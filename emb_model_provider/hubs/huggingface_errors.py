"""What the Hugging Face client raises, from five libraries, said in our words."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn

from emb_model_provider.errors import (
    AccessDeniedError,
    CorruptSnapshotError,
    HubError,
    HubUnavailableError,
    OfflineError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from emb_model_provider.hubs.storage import storage_error

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.hubs.base import HubConfig

_CACHE_SETTING = "EMB_PROVIDER_HF_CACHE_DIR"


def raise_translated(
    error: Exception, repository: str, revision: str, config: HubConfig, revisions: Callable[[], str]
) -> NoReturn:
    """Raise the client's error in our words; `revisions` is asked for those that there are."""
    from huggingface_hub import errors

    cause: BaseException = error
    # "cannot find it in the cache" only says that the request before it failed; that one is the reason.
    while isinstance(cause, errors.LocalEntryNotFoundError) and cause.__cause__ is not None:
        cause = cause.__cause__
    if isinstance(cause, errors.OfflineModeIsEnabled):
        raise OfflineError(
            f"{repository} is not on this machine, and HF_HUB_OFFLINE forbids fetching it. Unset it once."
        ) from error
    if isinstance(cause, errors.RevisionNotFoundError):
        raise RevisionNotFoundError(
            f"{repository} on Hugging Face has no branch, tag or commit {revision!r}; it has "
            f"{revisions()}. Set EMB_PROVIDER_MODEL_REVISION to one of them."
        ) from error
    if isinstance(cause, errors.HfHubHTTPError):
        raise _http_error(cause, repository, config) from error
    if isinstance(cause, errors.HFValidationError):
        raise RepositoryNotFoundError(
            f"{repository!r} cannot be a repository on Hugging Face (owner/name). "
            "Check EMB_PROVIDER_MODEL_NAME."
        ) from error
    if isinstance(cause, OSError):
        refused = storage_error(cause, config.cache_dir or "the Hugging Face cache", _CACHE_SETTING)
        if refused is not None:
            raise refused from error
    if isinstance(cause, OSError) and "Consistency check failed" in str(cause):
        raise CorruptSnapshotError(
            f"A file of {repository} arrived with another size than Hugging Face announces. Try again "
            "later, or another mirror: EMB_PROVIDER_HF_ENDPOINT."
        ) from error
    raise HubUnavailableError(
        f"Hugging Face could not be reached for {repository} ({type(cause).__name__}: {_line(cause, config)}). "
        "Check the network, or set EMB_PROVIDER_HF_ENDPOINT to a mirror."
    ) from error


def _http_error(error: Any, repository: str, config: HubConfig) -> HubError:
    from huggingface_hub.errors import DisabledRepoError, GatedRepoError

    status = error.response.status_code
    code = error.response.headers.get("X-Error-Code")
    given = "the token was refused" if config.token else "no token was given"
    if isinstance(error, GatedRepoError):
        return AccessDeniedError(
            f"{repository} on Hugging Face is gated, and {given} for it. Accept its terms on the web page, "
            "then set EMB_PROVIDER_HF_TOKEN."
        )
    if status == 404 or code == "RepoNotFound":
        return RepositoryNotFoundError(
            f"Hugging Face has no repository {repository}, or it is private ({given}). Check "
            "EMB_PROVIDER_MODEL_NAME, or set EMB_PROVIDER_HF_TOKEN."
        )
    if status in {401, 403}:
        what = "is disabled" if isinstance(error, DisabledRepoError) else f"is not open to us: {given}"
        return AccessDeniedError(
            f"{repository} on Hugging Face {what} (HTTP {status}). Set EMB_PROVIDER_HF_TOKEN to a token "
            "that may read it."
        )
    return HubUnavailableError(
        f"Hugging Face answered HTTP {status} for {repository}. Try again later, or set "
        "EMB_PROVIDER_HF_ENDPOINT to a mirror."
    )


def _line(error: BaseException, config: HubConfig) -> str:
    """An error's first line, without the token."""
    line = next(iter(str(error).strip().splitlines()), "")[:200]
    return line.replace(config.token, "***") if config.token else line
