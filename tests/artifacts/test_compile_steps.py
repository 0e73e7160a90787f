"""The step of a compilation, and the estimate of the time left."""

from __future__ import annotations

import pytest

from emb_model_provider.artifacts.compile_steps import CompileSteps

MEASURED = {
    "fp32": {"start": 1, "import": 39, "load": 4, "export": 12, "convert": 20, "save": 1, "reference vectors": 18,
             "verify": 31, "write": 1},
    "int8": {"start": 1, "import": 30, "load": 3, "export": 10, "convert": 15, "save": 1, "reference vectors": 17,
             "verify": 42, "quantize to int8": 16, "measure": 22, "write": 1},
    "idle": {"start": 0.3, "import": 6, "load": 0.6, "export": 2, "convert": 3, "reference vectors": 4, "verify": 7},
}  # fmt: skip
"""Seconds of the steps of the bundled model: on two cores with ten busy processes, and on idle ones."""


@pytest.mark.parametrize("case", MEASURED)
def test_estimate_is_steady(case: str) -> None:
    """It changes by 70 % at most within 5 s, beside the time that has passed, and comes to the truth."""
    steps = MEASURED[case]
    total, now = sum(steps.values()), 0.0
    progress = CompileSteps(quantizes=case == "int8", size=90_000_000, now=0.0)
    assert progress.count == (8 if case == "int8" else 6)
    ends, estimates, numbers = iter(steps.items()), [], []
    name, seconds = next(ends)
    end = seconds
    while now < total:
        while now >= end:
            name, seconds = next(ends)
            end += seconds
            progress.begin(name, now)
        estimates.append((now, progress.seconds_left(now)))
        numbers.append(progress.number)
        now += 0.25
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(1, progress.count + 1))
    for (earlier, before), (later, after) in zip(estimates, estimates[20:], strict=False):
        expected = max(before - (later - earlier), 0.0)
        assert abs(after - expected) <= 0.7 * max(before, 20), (earlier, before, after)
    halfway, left = estimates[len(estimates) // 2]
    assert 0.5 * (total - halfway) <= left <= 2 * (total - halfway)


def test_failed_exporter_is_followed_by_an_earlier_step() -> None:
    progress = CompileSteps(quantizes=False, size=10**9, now=0.0)
    for second, name in enumerate(("import", "load", "export", "convert"), start=1):
        progress.begin(name, float(second))
    assert (progress.number, progress.name) == (4, "convert")
    progress.begin("trace", 5.0)
    assert (progress.number, progress.name) == (3, "export")
    progress.begin("save", 6.0)
    assert progress.number == 3
    assert progress.seconds_left(1000.0) > 0
