"""Turns errors of the compiler into results: whether another attempt can succeed, and the reason for the operator."""

from __future__ import annotations

import re

from emb_model_provider.artifacts.compiler_process import CompileResult
from emb_model_provider.errors import LoadError
from emb_model_provider.formatting import describe_error

_MEMORY_TEXTS = ("can't allocate memory", "cannot allocate memory", "bad_alloc", "out of memory", "not enough memory")
"""Parts of the messages with which PyTorch and OpenVINO report that memory cannot be allocated, as a RuntimeError."""
_UNCONVERTED = re.compile(r"No conversion rule found for operations: ([^\n]+)")


def is_temporary(error: BaseException) -> bool:
    """Return whether an error is due to the state of the machine, such as its free memory or disk space."""
    return isinstance(error, OSError) or _lacks_memory(error)


def _lacks_memory(error: BaseException | None) -> bool:
    if error is None:
        return False
    says_so = isinstance(error, RuntimeError) and any(text in str(error).lower() for text in _MEMORY_TEXTS)
    return says_so or isinstance(error, MemoryError) or _lacks_memory(error.__cause__)


def result_of(error: BaseException, step: str) -> CompileResult:
    """Return the result of a compilation that ended with an unexpected error.

    An error that depends on the model only is `unsupported`, so that it is recorded. All others are `unable` or
    `no memory`, so that the next start tries again.

    Args:
        error: The error, which may also be a SystemExit that code of a repository raised.
        step: The name of the step in which it occurred.
    """
    reason = f"compiling failed at the step {step!r}: {describe_error(error)}"
    if _lacks_memory(error):
        return CompileResult("no memory", reason)
    depends_on_model = isinstance(error, Exception) and not isinstance(error, ImportError) and not is_temporary(error)
    return CompileResult("unsupported" if depends_on_model else "unable", reason)


def describe_export_error(error: BaseException) -> str:
    """Describe an error of an exporter, or of running its graph, in one line.

    It contains the operations that OpenVINO does not support. What a LoadError advises is for artifacts, not for a graph
    in a temporary directory.
    """
    if (match := _UNCONVERTED.search(str(error))) is not None:
        return f"OpenVINO does not support its operations {match[1].strip()}"
    if isinstance(error, LoadError) and isinstance(error.__cause__, RuntimeError):
        return f"OpenVINO cannot run its graph: {str(error.__cause__).strip().splitlines()[-1]}"
    return describe_error(error)
