"""Formats values for people: sizes, durations, cosines and errors."""

from __future__ import annotations

import math
from datetime import UTC, datetime

from emb_model_provider.errors import ProviderError

_SIZE_UNITS = ("B", "kB", "MB", "GB", "TB")
_MAX_QUOTE = 100
"""Longest quotation of a text, in characters."""
_AGE_UNITS = (("day", 86_400), ("hour", 3_600), ("minute", 60))


def format_size(count: float | None) -> str:
    """Return a number of bytes in powers of 1000, such as `1.2 GB`; `-` for None."""
    if count is None:
        return "-"
    unit = 0
    while abs(count) >= 999.5 and unit < len(_SIZE_UNITS) - 1:
        count, unit = count / 1000, unit + 1
    digits = 0 if unit == 0 or count >= 99.95 else 1
    return f"{count:.{digits}f} {_SIZE_UNITS[unit]}"


def format_duration(seconds: float) -> str:
    """Return a duration as `1:05` or `2:03:04`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def format_estimate(seconds: float) -> str:
    """Return about how long something takes, as `20 s` or `3 min`."""
    if seconds < 10:
        return f"{max(1, math.ceil(seconds))} s"
    return f"{5 * math.ceil(seconds / 5)} s" if seconds < 120 else f"{math.ceil(seconds / 60)} min"


def format_age(moment: datetime | None, now: datetime | None = None) -> str:
    """Return how long ago a moment was, such as `3 hours ago`; `-` for None."""
    if moment is None:
        return "-"
    seconds = ((now or datetime.now(UTC)) - moment).total_seconds()
    for name, length in _AGE_UNITS:
        if seconds >= length:
            count = int(seconds // length)
            return f"{count} {name}{'s' if count > 1 else ''} ago"
    return "just now"


def format_cosine(cosine: float) -> str:
    """Return a cosine with five digits, truncated so that 0.999996 is not shown as 1."""
    return f"{int(cosine * 100_000) / 100_000:.5f}"


def precision_label(precision: str, computed: str) -> str:
    """Return the name of a compiled form: the precision of its weights, or of the computation if they are fp32."""
    return computed if precision == "fp32" else precision


def first_line(error: BaseException, *, limit: int = 200, secret: str | None = None) -> str:
    """Return the first line of an error's message, or its class name if it has none, with `***` for `secret`."""
    lines = str(getattr(error, "message", None) or error).strip().splitlines()
    line = lines[0] if lines else type(error).__name__
    return (line.replace(secret, "***") if secret else line)[:limit]


def printable(text: str) -> str:
    """Return a text from another machine, in which `?` replaces control characters: a terminal would obey them."""
    return "".join(char if char.isprintable() or char in "\n\t" else "?" for char in text)


def describe_error(error: BaseException) -> str:
    """Return the message of an error of this package, and of any other error its class and the first line."""
    if isinstance(error, ProviderError):
        return error.message
    line = first_line(error)
    name = type(error).__name__
    return f"{name}: {line}" if line != name else name


def quote(value: object) -> str:
    """Quote a value for a message. Of long texts only the beginning is quoted, of arrays and objects only the size.

    The representation of a whole value could be as large as a request body, and take much longer to make.
    """
    match value:
        case str():
            quoted = repr(value[:_MAX_QUOTE])
            return quoted if len(value) <= _MAX_QUOTE else f"{quoted}… ({len(value)} characters)"
        case list() | tuple():
            return f"an array of {len(value)} items"
        case dict():
            return f"an object with {len(value)} keys"
    return repr(value)
