"""The texts of the console in English and Chinese, and the choice of the language."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from emb_model_provider.formatting import format_estimate, format_size

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request

Language = Literal["en", "zh"]

LANGUAGES: tuple[Language, ...] = get_args(Language)
LANGUAGE_COOKIE = "emb_provider_language"
_DIRECTORY = Path(__file__).parent / "texts"
_AGE_UNITS = (("day", 86_400), ("hour", 3_600), ("minute", 60), ("second", 1))


class Texts:
    """The texts of one language, by key. Calling it returns a text, with values in place of `{name}`."""

    def __init__(self, language: Language, texts: Mapping[str, str]) -> None:
        self.language = language
        self.html_language = "zh-CN" if language == "zh" else "en"
        self._texts = texts

    def __call__(self, key: str, **values: object) -> str:
        return self._texts[key].format(**values)

    def optional(self, prefix: str, key: str) -> str:
        """Return the text of `prefix.key`, or the key itself if there is none."""
        return self._texts.get(f"{prefix}.{key}", key)

    def age(self, moment: datetime | float | None) -> str:
        """Return how long ago a moment was, such as `3 hours ago`; `–` for None."""
        if moment is None:
            return "–"
        if not isinstance(moment, datetime):
            moment = datetime.fromtimestamp(moment, UTC)
        seconds = (datetime.now(UTC) - moment).total_seconds()
        for unit, length in _AGE_UNITS:
            if seconds >= length:
                count = int(seconds // length)
                return self(f"age.{unit}" if count == 1 else f"age.{unit}s", n=count)
        return self("age.now")

    def estimate(self, seconds: float) -> str:
        """Return about how long something takes, such as `20 s` or `3 min`."""
        return format_estimate(seconds) if seconds < 120 else self("duration.minutes", n=math.ceil(seconds / 60))

    def duration(self, seconds: float | None) -> str:
        """Return a duration such as `12.3 ms` or `1.20 s`; `–` for None."""
        if seconds is None:
            return "–"
        if seconds < 1:
            return f"{number(seconds * 1000)} ms"
        return f"{seconds:.2f} s" if seconds < 60 else self("duration.minutes", n=round(seconds / 60))


def number(value: float | None) -> str:
    """Return a number with up to three significant digits; `–` for None."""
    if value is None:
        return "–"
    if isinstance(value, int) or value == 0 or abs(value) >= 99.95:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


def size(value: float | None) -> str:
    return format_size(value).replace(" ", "\u00a0") if value is not None else "–"


@cache
def texts_in(language: Language) -> Texts:
    return Texts(language, json.loads((_DIRECTORY / f"{language}.json").read_text(encoding="utf-8")))


def choose_language(request: Request) -> Language:
    """Return the language of the query (`?lang=zh`), of the cookie, or of the browser, in this order; else English."""
    for chosen in (request.query_params.get("lang"), request.cookies.get(LANGUAGE_COOKIE)):
        for language in LANGUAGES:
            if chosen == language:
                return language
    return _preferred(request.headers.get("accept-language", ""))


def _preferred(header: str) -> Language:
    """Return the first language of an Accept-Language header, by its weights, that the console has."""
    weighted: list[tuple[float, str]] = []
    for item in header.split(","):
        name, _, quality = item.strip().partition(";q=")
        try:
            weight = float(quality or 1)
        except ValueError:
            continue
        weighted.append((weight, name.lower().partition("-")[0]))
    for weight, name in sorted(weighted, key=lambda each: -each[0]):
        for language in LANGUAGES:
            if name == language and weight > 0:
                return language
    return "en"
