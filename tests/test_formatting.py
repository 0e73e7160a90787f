"""Values as text for people."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from emb_model_provider.errors import HubError
from emb_model_provider.formatting import (
    describe_error,
    first_line,
    format_age,
    format_cosine,
    format_duration,
    format_size,
)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (90_868_376, "90.9 MB"),
        (99_960_000, "100 MB"),
        (999_960, "1.0 MB"),
        (1.2e9, "1.2 GB"),
        (None, "-"),
    ],
)
def test_sizes_are_in_powers_of_1000(count: float | None, text: str) -> None:
    assert format_size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(5, "just now"), (60, "1 minute ago"), (7200, "2 hours ago"), (3 * 86_400, "3 days ago")]
)
def test_ages_are_in_the_largest_unit(seconds: int, text: str) -> None:
    now = datetime(2030, 1, 2, tzinfo=UTC)
    assert format_age(now - timedelta(seconds=seconds), now) == text
    assert format_age(None) == "-"


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (65, "1:05"), (59.7, "1:00"), (7384, "2:03:04")])
def test_durations_are_minutes_and_seconds(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_cosine_below_1_is_not_rounded_to_1() -> None:
    assert format_cosine(0.999996) == "0.99999"
    assert format_cosine(1.0) == "1.00000"


def test_the_first_line_of_an_error_hides_a_secret() -> None:
    assert first_line(ValueError("token abc is wrong\nmore"), secret="abc") == "token *** is wrong"
    assert first_line(ValueError("x" * 300), limit=10) == "x" * 10
    assert first_line(ValueError()) == "ValueError"


def test_foreign_errors_are_described_with_their_class() -> None:
    assert describe_error(HubError("The hub is down.")) == "The hub is down."
    assert describe_error(ValueError("bad\nvalue")) == "ValueError: bad"
    assert describe_error(ValueError()) == "ValueError"
