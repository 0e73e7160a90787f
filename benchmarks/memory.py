"""Does memory stay bounded? Thousands of shapes through the compiled engine. `python -m benchmarks.memory --help`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.contenders import OURS, SERVICE_CACHE
from benchmarks.inprocess import measure
from benchmarks.machine import machine_lines
from benchmarks.progress import say
from benchmarks.table import number, table

if TYPE_CHECKING:
    from collections.abc import Sequence

_COMPILED = [name for name, settings in OURS.items() if settings.get("BACKEND") != "torch"]
_TOKENS = 2048
"""Of a batch at most: the backend runs larger ones in parts of that."""
_LENGTHS = (*range(1, 65), *range(72, 257, 8))
"""Those that the backend does not round up to another, so that each shape here is one to the runtime too."""
_STEPS = 12
_WARM_UP = 6
"""Of the steps: what comes after them is what grows without end, if anything does."""
_QUICK_SHAPES = 120

Shape = tuple[int, int]
"""Inputs, and tokens of each."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    count = _QUICK_SHAPES if options.quick else options.shapes
    settings = {name.lower(): value for name, value in OURS[options.contender].items()}
    say(f"{count} shapes through {options.contender}")
    seen = measure(
        {
            "kind": "memory",
            "settings": {"cache_dir": str(SERVICE_CACHE), **settings},
            "steps": [part.tolist() for part in np.array_split(np.array(shapes(count)), _STEPS)],
        },
        timeout_s=7200.0,
    )
    print(_report(seen, count))
    return 0


def shapes(count: int, *, seed: int = 1) -> list[Shape]:
    """Return different shapes in a random order, small ones more often, each of at most 2,048 tokens."""
    every = np.array([(rows, length) for length in _LENGTHS for rows in range(1, _TOKENS // length + 1)])
    weights = 1 / every.prod(axis=1)
    drawn = np.random.default_rng(seed).choice(
        len(every), count, replace=False, p=weights / weights.sum(), shuffle=True
    )
    return [(int(rows), int(length)) for rows, length in every[drawn]]


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--contender", default="ours", choices=_COMPILED, help="(default: %(default)s)")
    parser.add_argument("--shapes", type=int, default=3600, help="(default: %(default)s)")
    parser.add_argument("--quick", action="store_true",
                        help="tiny: does everything work? Its figures mean nothing")  # fmt: skip
    return parser.parse_args(arguments)


def _report(seen: dict[str, Any], count: int) -> str:
    notes = [
        f"{count:,} different shapes (inputs x tokens of each, 1 to {max(_LENGTHS)} tokens, at most {_TOKENS:,} in all, "
        f"small ones more often), each once, in a random order, from {seen['threads']} thread(s); {seen['about']}",
        "Resident memory of the process: tokenizer, both copies of the graph, NumPy, Python. Peak is the highest so far",
    ]
    rows = [["loaded", *map(number, seen["loaded"].values())]]
    done = 0
    for step in seen["steps"]:
        done += step["shapes"]
        rows.append([f"{done:,}", number(step["resident_mib"]), number(step["peak_mib"])])
    warm, end = seen["steps"][_WARM_UP - 1], seen["steps"][-1]
    growth = end["resident_mib"] - warm["resident_mib"]
    return "\n\n".join(
        [
            "# Memory",
            "\n".join(machine_lines("benchmarks.memory", notes)),
            "## Resident memory by shapes seen",
            table(["Shapes", "resident, MiB", "peak, MiB"], rows),
            f"From the {rows[_WARM_UP][0]}th shape to the last: {growth:+.1f} MiB resident "
            f"({100 * growth / warm['resident_mib']:+.1f} %), {end['peak_mib'] - warm['peak_mib']:+.1f} MiB at the peak.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
