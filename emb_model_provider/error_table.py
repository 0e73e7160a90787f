"""The table of errors: each class with its code, HTTP status and exit code."""

from __future__ import annotations

from typing import Final, NamedTuple

from emb_model_provider import errors

# Exit codes
OK: Final = 0
FAILED: Final = 1  # the command failed, or a check found a difference
USAGE_ERROR: Final = 2  # invalid usage, not found, or not allowed
UNREACHABLE: Final = 3  # no server responds
INTERRUPTED: Final = 130  # by Ctrl-C


class ErrorInfo(NamedTuple):
    """How an error is reported."""

    code: str
    """Machine-readable name in responses and in download jobs."""
    status: int
    exit_code: int = FAILED


_TABLE: tuple[tuple[type[errors.ProviderError], ErrorInfo], ...] = (
    (errors.ModelNotFoundError, ErrorInfo("model_not_found", 404)),
    (errors.UnknownFileError, ErrorInfo("file_not_found", 404, USAGE_ERROR)),
    (errors.UnknownBatchError, ErrorInfo("batch_not_found", 404, USAGE_ERROR)),
    (errors.StateConflictError, ErrorInfo("state_conflict", 409, USAGE_ERROR)),
    (errors.FileTooLargeError, ErrorInfo("file_too_large", 413)),
    (errors.RequestError, ErrorInfo("invalid_value", 400)),
    (errors.BodyTooLargeError, ErrorInfo("request_too_large", 413)),
    (errors.CompressedBodyError, ErrorInfo("unsupported_content_encoding", 415)),
    (errors.ReceiveTimeoutError, ErrorInfo("request_timeout", 408)),
    (errors.QueueFullError, ErrorInfo("queue_full", 429)),
    (errors.QuotaExceededError, ErrorInfo("rate_limit_exceeded", 429)),
    (errors.TooManyBatchesError, ErrorInfo("batch_limit_exceeded", 429)),
    (errors.ModelNotReadyError, ErrorInfo("model_not_ready", 503)),
    (errors.DatabaseUnavailableError, ErrorInfo("database_unavailable", 503)),
    (errors.StorageFullError, ErrorInfo("insufficient_storage", 507)),
    (errors.ThreadLimitError, ErrorInfo("thread_limit", 503)),
    (errors.DeadlineExceededError, ErrorInfo("timeout", 504)),
    (errors.NotCachedError, ErrorInfo("not_cached", 404, USAGE_ERROR)),
    (errors.AmbiguousNameError, ErrorInfo("ambiguous_name", 400, USAGE_ERROR)),
    (errors.JobNotFoundError, ErrorInfo("job_not_found", 404)),
    (errors.ModelInUseError, ErrorInfo("model_in_use", 409, USAGE_ERROR)),
    (errors.AliasInUseError, ErrorInfo("alias_in_use", 409)),
    (errors.NotAllowedError, ErrorInfo("not_allowed", 403, USAGE_ERROR)),
    (errors.SettingsError, ErrorInfo("invalid_value", 400, USAGE_ERROR)),
    (errors.RepositoryNotFoundError, ErrorInfo("repository_not_found", 404, USAGE_ERROR)),
    (errors.RevisionNotFoundError, ErrorInfo("revision_not_found", 404, USAGE_ERROR)),
    (errors.AccessDeniedError, ErrorInfo("hub_access_denied", 403, USAGE_ERROR)),
    (errors.OfflineError, ErrorInfo("offline", 403)),
    (errors.IncompleteRepositoryError, ErrorInfo("no_model", 400)),
    (errors.OperationCancelledError, ErrorInfo("cancelled", 409)),
    (errors.CacheNotWritableError, ErrorInfo("cache_not_writable", 500)),
    (errors.HubUnavailableError, ErrorInfo("hub_unavailable", 502)),
    (errors.CorruptSnapshotError, ErrorInfo("corrupt_files", 502)),
    (errors.HubError, ErrorInfo("hub_error", 502)),
    (errors.InvalidTransferError, ErrorInfo("invalid_transfer", 400, USAGE_ERROR)),
    (errors.PermissionRequiredError, ErrorInfo("permission_required", 403, USAGE_ERROR)),
    (errors.LicenseRequiredError, ErrorInfo("license_required", 400, USAGE_ERROR)),
    (errors.TransferError, ErrorInfo("transfer_failed", 502)),
    (errors.InvalidBulkJobError, ErrorInfo("invalid_bulk_job", 400, USAGE_ERROR)),
    (errors.BulkError, ErrorInfo("bulk_failed", 500)),
    (errors.UnsupportedModelError, ErrorInfo("unsupported_model", 400)),
    (errors.UnsupportedPrecisionError, ErrorInfo("unsupported_precision", 400)),
    (errors.DeviceUnavailableError, ErrorInfo("device_unavailable", 400)),
    (errors.LoadError, ErrorInfo("load_failed", 500)),
    (errors.ManagementError, ErrorInfo("cache_not_writable", 500)),
)
"""Subclasses come before their base classes, because the first match counts."""

UNEXPECTED = ErrorInfo("internal_error", 500)
"""Any error that is not in the table. Its message is written to the log and not sent to clients."""


def error_info(error: BaseException) -> ErrorInfo:
    """Return the code, HTTP status and exit code of an error."""
    info = next((info for cls, info in _TABLE if isinstance(error, cls)), UNEXPECTED)
    return info._replace(code=error.code) if isinstance(error, errors.RequestError) else info
