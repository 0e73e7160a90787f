"""What a command's exit status says, so that scripts can act on it."""

from __future__ import annotations

from emb_model_provider.errors import (
    AccessDeniedError,
    AmbiguousNameError,
    ModelInUseError,
    NotAllowedError,
    NotCachedError,
    ProviderError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SettingsError,
)

FAILED = 1
"""The work failed, or something differs."""
NOT_SO = 2
"""It cannot be asked like this: usage, not found, not allowed."""
OUT_OF_REACH = 3
"""No server answers."""
INTERRUPTED = 130
"""Ctrl-C."""

_ASKED_WRONGLY = (
    SettingsError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    AccessDeniedError,
    NotCachedError,
    AmbiguousNameError,
    NotAllowedError,
    ModelInUseError,
)


class OutOfReachError(ProviderError):
    """No server of ours answers at the address."""


class RefusedError(ProviderError):
    """The server does not do what was asked; `status` is the exit status that this means."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


def status_of(error: ProviderError) -> int:
    """Return the exit status that an error means."""
    if isinstance(error, RefusedError):
        return error.status
    if isinstance(error, OutOfReachError):
        return OUT_OF_REACH
    return NOT_SO if isinstance(error, _ASKED_WRONGLY) else FAILED
