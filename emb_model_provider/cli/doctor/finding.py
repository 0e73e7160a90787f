"""What a check found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warn", "fail"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's."""

    check: str
    level: Level
    """fail: something that is configured cannot work; warn: it works, and could be better, or might not some day."""
    found: str
    advice: str = ""
    """What to do: a command to type or a setting; empty where nothing is to be done."""
