"""Marks of parametrized tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterable

    from _pytest.mark.structures import ParameterSet


def mark_slow_except(names: Iterable[str], *defaults: str) -> list[ParameterSet]:
    """Return parameters of a test, all but the defaults marked as slow."""
    return [pytest.param(name, marks=() if name in defaults else pytest.mark.slow) for name in names]
