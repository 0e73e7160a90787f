"""What can go wrong, in the domain's words.

No HTTP in here: `api/errors.py` gives each error its status, once. Every message is written for the
person who reads it: what happened, then what to do.
"""

from __future__ import annotations


class ProviderError(Exception):
    """Base of all errors that this package raises on purpose."""

    @property
    def message(self) -> str:
        return str(self)


class SettingsError(ProviderError):
    """A setting has a value that cannot be used; the message names the variable and what is allowed."""


# --- fetching -----------------------------------------------------------------------------------------


class HubError(ProviderError):
    """A snapshot could not be had from a hub."""


class RepositoryNotFoundError(HubError):
    """The hub has no such repository, or hides it from this token."""


class RevisionNotFoundError(HubError):
    """The repository has no such branch, tag or commit."""


class AccessDeniedError(HubError):
    """The hub asks for a token, or refuses the one it was given."""


class HubUnavailableError(HubError):
    """The hub did not answer, or answered that it cannot serve now."""


class OfflineError(HubError):
    """A file is missing here, and OFFLINE forbids asking a hub for it."""


class CorruptSnapshotError(HubError):
    """A file's bytes are not the ones that were announced."""


class IncompleteRepositoryError(HubError):
    """The repository, at this revision, holds no model (no config.json, or no weights)."""


class CacheNotWritableError(HubError):
    """A cache directory cannot be written."""


class FetchCancelledError(HubError):
    """Whoever asked for the files wants them no more."""


# --- managing -----------------------------------------------------------------------------------------


class ManagementError(ProviderError):
    """A model on disk or in memory cannot be managed as asked."""


class NotCachedError(ManagementError):
    """No model of this name is on disk."""


class AmbiguousNameError(ManagementError):
    """Several models on disk have this id: nothing was done."""


class ModelInUseError(ManagementError):
    """The model is loaded, being loaded or being fetched, here or in another process: nothing was changed."""


class JobNotFoundError(ManagementError):
    """There is no such job, or it ended long ago."""


class NotAllowedError(ManagementError):
    """It may not be done from here, such as loading a directory over HTTP."""


# --- loading ------------------------------------------------------------------------------------------


class LoadError(ProviderError):
    """A snapshot could not be turned into a running model."""


class UnsupportedModelError(LoadError):
    """The model needs something that is not supported, such as a pooling or a tokenizer of its own."""


class UnsupportedPrecisionError(LoadError):
    """The precision is not available on this backend or device."""


class DeviceUnavailableError(LoadError):
    """The device that was asked for is not on this machine."""


# --- answering ----------------------------------------------------------------------------------------


class RequestError(ProviderError):
    """The caller's request cannot be answered as it stands.

    `param` is the request's field at fault; `code` is the machine-readable name of the fault.
    """

    code = "invalid_value"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        if code is not None:
            self.code = code


class InputTooLongError(RequestError):
    """An input has more tokens than the model reads, and the request does not allow cutting it."""

    code = "context_length_exceeded"

    def __init__(self, index: int, max_length: int) -> None:
        super().__init__(
            f"Invalid 'input[{index}]': maximum input length is {max_length} tokens.", param="input"
        )


class TooManyTokensError(RequestError):
    """All inputs of a request together have more tokens than one request may carry."""

    code = "max_tokens_per_request"

    def __init__(self, tokens: int, limit: int) -> None:
        super().__init__(f"Requested {tokens} tokens, max {limit} tokens per request.", param="input")


class DimensionsError(RequestError):
    """The model cannot give vectors of the requested size."""

    code = "invalid_dimensions"

    def __init__(self, allowed: str) -> None:
        super().__init__(
            f"This model does not support specifying dimensions. (allowed: {allowed})", param="dimensions"
        )


class TokenInputError(RequestError):
    """The request carries token ids that the model is not configured to read, or that are out of range."""

    code = "token_input_unsupported"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message, param="input", code=code)


class ModelNotFoundError(RequestError):
    """No served model goes by this name."""

    code = "model_not_found"

    def __init__(self, model: str, served: str) -> None:
        super().__init__(f"The model `{model}` does not exist. Served here: {served}.", param="model")


class ModelNotReadyError(ProviderError):
    """The model is configured but cannot answer yet (loading, draining) or failed to load.

    `retry_after_s` is how long a caller should wait before asking again, in seconds.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFullError(ProviderError):
    """More work waits for the model than the queue may hold.

    `retry_after_s` estimates when the queue will have room, in seconds.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceededError(ProviderError):
    """The request was not answered within REQUEST_TIMEOUT_S; its remaining work was dropped."""


class InferenceError(ProviderError):
    """The model failed on an input, or gave a vector that is not finite."""
