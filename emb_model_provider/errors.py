"""Errors of this package. `error_table.py` maps each class to its code, HTTP status and exit code."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def is_failure(error: BaseException) -> bool:
    """Return whether an error is a failure, and not a request to end, such as KeyboardInterrupt or a cancellation.

    A panic of a library in Rust, such as tokenizers, is a failure, although its class derives from BaseException only.
    """
    return isinstance(error, Exception) or type(error).__module__ == "pyo3_runtime"


class ProviderError(Exception):
    """Base class of all errors of this package."""

    @property
    def message(self) -> str:
        return str(self)


class SettingsError(ProviderError):
    """A setting has an invalid value; the message names the variable and what is allowed."""


class OperationCancelledError(ProviderError):
    """The operation was cancelled by its caller."""


class HubError(ProviderError):
    """A snapshot could not be downloaded from a hub."""


class RepositoryNotFoundError(HubError):
    """The hub has no such repository, or hides it from this token."""


class RevisionNotFoundError(HubError):
    """The repository has no such branch, tag or commit."""


class AccessDeniedError(HubError):
    """The hub requires a token, or rejects the token that was sent."""


class HubUnavailableError(HubError):
    """The hub did not respond, or responded that it cannot serve requests now."""


class OfflineError(HubError):
    """A file is missing on this machine, and OFFLINE forbids downloading it."""


class CorruptSnapshotError(HubError):
    """The bytes of a file differ from what the hub announced."""


class IncompleteRepositoryError(HubError):
    """The repository contains no model at this revision (no config.json, or no weights)."""


class CacheNotWritableError(HubError):
    """A cache directory is not writable."""


class ManagementError(ProviderError):
    """A request to manage a model on disk or in memory failed."""


class NotCachedError(ManagementError):
    """No model of this name is on disk."""


class AmbiguousNameError(ManagementError):
    """Several models on disk have this id. Nothing was changed."""


class ModelInUseError(ManagementError):
    """This or another process has loaded the model, or is loading or downloading it. Nothing was changed."""


class AliasInUseError(ManagementError):
    """Another model already has this alias."""


class JobNotFoundError(ManagementError):
    """The job does not exist, or ended long ago."""


class NotAllowedError(ManagementError):
    """The operation is not allowed, for example loading a directory over HTTP."""


class DirectoryNotAllowedError(NotAllowedError):
    """A request names a directory of this machine."""


class TransferError(ProviderError):
    """A repository could not be transferred to another hub."""


class InvalidTransferError(TransferError):
    """The source, the destination or a line of a list is invalid."""


class PermissionRequiredError(TransferError):
    """The source is gated, non-commercial or private, and the user has not confirmed that they may copy it."""


class LicenseRequiredError(TransferError):
    """The source names no license, and neither does the user."""


class BulkError(ProviderError):
    """A bulk job stopped before its end. What it has written is complete, and it can be resumed."""


class InvalidBulkJobError(BulkError):
    """The input of a bulk job cannot be read, or its output directory belongs to another job."""


class LoadError(ProviderError):
    """A snapshot could not be loaded."""


class UnsupportedModelError(LoadError):
    """The model requires something that is not supported, for example its own pooling or tokenizer."""


class UnsupportedPrecisionError(LoadError):
    """The precision is not available on this backend or device."""


class DeviceUnavailableError(LoadError):
    """The requested device is not present on this machine."""


class BodyTooLargeError(ProviderError):
    """The request body exceeds MAX_BODY_MB."""


class CompressedBodyError(ProviderError):
    """The request body has a Content-Encoding that is not supported."""


class ReceiveTimeoutError(ProviderError):
    """The client did not send its whole request within RECEIVE_TIMEOUT_S."""


class RequestError(ProviderError):
    """The request is invalid."""

    code = "invalid_value"
    """Machine-readable name of the error."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        """The invalid field of the request."""
        self.code = code or self.code


class InputTooLongError(RequestError):
    """An input has more tokens than the model supports, and the request forbids truncation."""

    code = "context_length_exceeded"

    def __init__(self, index: int, max_length: int, *, param: str = "input") -> None:
        super().__init__(f"Invalid '{param}[{index}]': maximum input length is {max_length} tokens.", param=param)
        self.index = index
        self.max_length = max_length


class TextTooLongError(RequestError):
    """A text has more characters than the tokenizer may read."""

    code = "string_above_max_length"

    def __init__(self, index: int, characters: int, limit: int, *, param: str = "input") -> None:
        super().__init__(
            f"Invalid '{param}[{index}]': the text has {characters} characters, and the tokenizer reads texts of up to {limit}. "
            "Divide the text into several inputs.",
            param=param,
        )
        self.index = index
        self.characters = characters
        self.limit = limit


class TooManyTokensError(RequestError):
    """The inputs of a request have more tokens in total than a request may have."""

    code = "max_tokens_per_request"

    def __init__(self, tokens: int, limit: int, *, param: str = "input") -> None:
        super().__init__(f"Requested {tokens} tokens, max {limit} tokens per request.", param=param)


class DimensionsError(RequestError):
    """The model does not support vectors of the requested size."""

    code = "invalid_dimensions"

    def __init__(self, allowed: str, native: int) -> None:
        super().__init__(
            f"This model does not support specifying dimensions. (allowed: {allowed}) Its vectors have {native} "
            f"dimensions: set 'dimensions' to {native} or remove it. To allow other sizes, the operator can set the key "
            '"dimensions" of this model in EMB_PROVIDER_MODEL_MAPPING.',
            param="dimensions",
        )


class UnsupportedTaskError(RequestError):
    """The model cannot do what the request asks for, because it is of another kind."""

    code = "unsupported_task"

    def __init__(self, model: str, kind: str, task: str, tasks: Sequence[str]) -> None:
        """Create an error for a model of a kind that was asked for a task, and has others."""
        supported = ", ".join(f"'{each}'" for each in tasks)
        outputs = [each.removeprefix("embed_") for each in tasks if each.startswith("embed_")]
        remedy = (
            f"Set 'embedding_types' of POST /v1/embeddings to {outputs}, or choose"
            if task == "embed" and outputs
            else "Choose"
        )
        super().__init__(
            f"The model `{model}` does not support '{task}': its kind is {kind!r}. Supported tasks: [{supported}]. "
            f"{remedy} another model for this request.",
            param="model",
        )


class TokenInputError(RequestError):
    """The request contains token ids that the model is not configured to accept, or that are out of range."""

    code = "token_input_unsupported"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message, param="input", code=code)


class ModelNotFoundError(RequestError):
    """No served model has this name."""

    code = "model_not_found"

    def __init__(self, model: str, served: str, reason: str = "does not exist") -> None:
        super().__init__(f"The model `{model}` {reason}. Served here: {served}.", param="model")


class UnknownFileError(RequestError):
    """No uploaded file has this id, or it belongs to another API key."""

    code = "file_not_found"

    def __init__(self, file_id: str, *, param: str = "id") -> None:
        super().__init__(f"No such File object: {file_id[:100]}", param=param)


class UnknownBatchError(RequestError):
    """No batch has this id, or it belongs to another API key."""

    code = "batch_not_found"

    def __init__(self, batch_id: str) -> None:
        super().__init__(f"No batch found with id '{batch_id[:100]}'.", param="id")


class StateConflictError(RequestError):
    """The state of the file or batch does not allow the operation. Nothing was changed."""

    code = "state_conflict"


class FileTooLargeError(RequestError):
    """An uploaded file is larger than MAX_FILE_BYTES."""

    code = "file_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(
            f"The file has more than {limit} bytes, the limit of this server. Divide it into several files.",
            param="file",
        )


class StorageFullError(ProviderError):
    """The disk of the files and batches has not enough space."""


class ForkedProcessError(ProviderError):
    """The process was forked from one that had loaded a model, and its copy of the model has no threads."""


class RetryLaterError(ProviderError):
    """The request cannot be answered now."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        """How long the client should wait before it retries, in seconds."""


class NotLoadedHereError(RetryLaterError):
    """The model is not loaded in this worker, which forwards the request to the primary worker."""

    def __init__(self) -> None:
        super().__init__("The model is not loaded in this worker yet. Try again later.", retry_after_s=1.0)


class ModelNotReadyError(RetryLaterError):
    """The model is not loaded yet, or failed to load."""


class QueueFullError(RetryLaterError):
    """The queue is full."""


class QuotaExceededError(RetryLaterError):
    """The tokens per minute of an API key are used up."""


class TooManyBatchesError(RetryLaterError):
    """An API key has MAX_UNFINISHED_BATCHES batches that have not ended."""


class DatabaseUnavailableError(RetryLaterError):
    """The database of batches does not respond."""


class ThreadLimitError(RetryLaterError):
    """The operating system refuses to start another thread."""


class DeadlineExceededError(ProviderError):
    """The model made no progress, or the request took too long. Its remaining work was dropped."""

    def __init__(self, message: str, *, can_repeat: bool) -> None:
        super().__init__(message)
        self.can_repeat = can_repeat
        """Whether the same request can succeed later, because it was only waiting for others."""


class InferenceError(ProviderError):
    """The model failed on an input, or returned a non-finite vector."""


class DeviceLostError(InferenceError):
    """A GPU has failed, and every later computation on it in this process fails."""
