"""At which step of how many a compilation is, and how long the rest takes."""

from __future__ import annotations

from typing import NamedTuple


class _Step(NamedTuple):
    name: str
    names: tuple[str, ...]
    """The steps of the compiler that it consists of; those in no list belong to the present one."""
    base_s: float
    per_gb_s: float


_GB = 10**9
_STEPS = (
    _Step("import", ("start", "import"), 6, 0),
    _Step("load", ("load",), 0.5, 10),
    _Step("export", ("export", "trace"), 2, 8),
    _Step("convert", ("convert",), 3, 15),
    _Step("reference vectors", ("reference vectors",), 4, 10),
    _Step("verify", ("verify",), 6, 10),
)
_QUANTIZE_STEPS = (
    _Step("quantize", ("quantize to int8", "quantize to int4"), 4, 40),
    _Step("measure", ("measure",), 5, 10),
)
"""Seconds on two idle cores: a constant part, and one for each gigabyte of weights. Only their ratios matter, because the
speed is measured while the steps end."""
_PRIOR_S = 6.0
"""Weight of the speed of that machine, as seconds of work."""
_OVERRUN = 0.1
"""A step that takes longer than expected takes this share of the time that it has already taken, as far as is known."""


class CompileSteps:
    """The steps of one compilation. Times are those of the monotonic clock."""

    def __init__(self, *, quantizes: bool, size: int, now: float) -> None:
        """Begin with the first step of a model whose files have `size` bytes."""
        self._steps = _STEPS + (_QUANTIZE_STEPS if quantizes else ())
        self._expected = [step.base_s + step.per_gb_s * size / _GB for step in self._steps]
        self._index = 0
        self._began_at = now
        self._ended_s = self._ended_expected_s = 0.0

    @property
    def number(self) -> int:
        return self._index + 1

    @property
    def count(self) -> int:
        return len(self._steps)

    @property
    def name(self) -> str:
        return self._steps[self._index].name

    def begin(self, name: str, now: float) -> None:
        """Begin a step of the compiler. An exporter that failed is followed by an earlier step."""
        index = next((index for index, step in enumerate(self._steps) if name in step.names), self._index)
        if index != self._index:
            self._ended_s += now - self._began_at
            self._ended_expected_s += self._expected[self._index]
            self._index, self._began_at = index, now

    def seconds_left(self, now: float) -> float:
        elapsed_s, expected_s = now - self._began_at, self._expected[self._index]
        before = (_PRIOR_S + self._ended_s) / (_PRIOR_S + self._ended_expected_s)
        # Also while the present step takes longer than expected, so that the estimate does not jump at its end.
        present = (_PRIOR_S + self._ended_s + elapsed_s) / (_PRIOR_S + self._ended_expected_s + expected_s)
        slowness = max(before, present)
        present_s = max(slowness * expected_s - elapsed_s, _OVERRUN * elapsed_s)
        return present_s + slowness * sum(self._expected[self._index + 1 :])
