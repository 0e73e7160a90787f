"""Each error has its code, HTTP status and exit code."""

from __future__ import annotations

import inspect

import pytest

from emb_model_provider import errors
from emb_model_provider.error_table import FAILED, UNEXPECTED, USAGE_ERROR, ErrorInfo, error_info

EXAMPLES = [
    (errors.DimensionsError("1 to 384", 384), ErrorInfo("invalid_dimensions", 400)),
    (errors.ModelNotFoundError("a", "b"), ErrorInfo("model_not_found", 404)),
    (errors.RequestError("invalid", code="invalid_json"), ErrorInfo("invalid_json", 400)),
    (errors.QueueFullError("full", retry_after_s=1), ErrorInfo("queue_full", 429)),
    (errors.ModelInUseError("in use"), ErrorInfo("model_in_use", 409, USAGE_ERROR)),
    (errors.ManagementError("not writable"), ErrorInfo("cache_not_writable", 500, FAILED)),
    (errors.RepositoryNotFoundError("not found"), ErrorInfo("repository_not_found", 404, USAGE_ERROR)),
    (errors.HubError("failed"), ErrorInfo("hub_error", 502, FAILED)),
    (errors.InferenceError("not finite"), UNEXPECTED),
    (ValueError("a defect"), UNEXPECTED),
]


@pytest.mark.parametrize(("error", "expected"), EXAMPLES, ids=lambda value: type(value).__name__)
def test_info_of_an_error(error: Exception, expected: ErrorInfo) -> None:
    """Subclasses have their own entry or that of their base class, and other errors are unexpected."""
    assert error_info(error) == expected


def test_subclasses_are_not_hidden_by_their_base_classes() -> None:
    """Errors with different meanings have different codes, so that the order of the table is right."""
    management = [
        cls
        for _, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, errors.HubError | errors.LoadError)
    ]
    codes = [error_info(cls("")).code for cls in management]
    assert len(management) > 10
    assert len(set(codes)) == len(codes)
