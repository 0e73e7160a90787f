"""Measures whether memory stays bounded when a compiled model runs batches of thousands of different shapes."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import QUICK_HELP
from benchmarks.contenders import OURS, SERVICE_CACHE
from benchmarks.inprocess import measure
from benchmarks.report import describe_run, format_number, log_progress, markdown_table

if TYPE_CHECKING:
    from collections.abc import Sequence

_COMPILED = [name for name, settings in OURS.items() if settings.get("BACKEND") != "torch"]
_MAX_TOKENS = 2048
"""Padded tokens of a batch. The backend splits larger batches."""
_LENGTHS = (*range(1, 65), *range(72, 257, 8))
"""Lengths that the backend does not round up, so that each shape here is also a shape in the runtime."""
_STEPS = 12
_WARM_UP_STEPS = 6
"""Growth after these steps is unbounded growth."""
_QUICK_SHAPES = 120

Shape = tuple[int, int]
"""Inputs, and tokens of each input."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse_options(arguments)
    count = _QUICK_SHAPES if options.quick else options.shapes
    settings = {name.lower(): value for name, value in OURS[options.contender].items()}
    log_progress(f"running {count} shapes with {options.contender}")
    result = measure(
        {
            "kind": "memory",
            "settings": {"cache_dir": str(SERVICE_CACHE), **settings},
            "steps": [part.tolist() for part in np.array_split(np.array(draw_shapes(count)), _STEPS)],
        },
        timeout_s=7200.0,
    )
    print(_report(result, count))
    return 0


def draw_shapes(count: int, *, seed: int = 1) -> list[Shape]:
    """Return different shapes of at most 2,048 tokens in a random order. Small shapes are more likely."""
    shapes = np.array([(rows, length) for length in _LENGTHS for rows in range(1, _MAX_TOKENS // length + 1)])
    weights = 1 / shapes.prod(axis=1)
    drawn = np.random.default_rng(seed).choice(
        len(shapes), count, replace=False, p=weights / weights.sum(), shuffle=True
    )
    return [(int(rows), int(length)) for rows, length in shapes[drawn]]


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--contender", default="ours", choices=_COMPILED, help="(default: %(default)s)")
    parser.add_argument("--shapes", type=int, default=3600, help="number of shapes (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    return parser.parse_args(arguments)


def _report(result: dict[str, Any], count: int) -> str:
    notes = [
        f"{count:,} different shapes (inputs x tokens per input, 1 to {max(_LENGTHS)} tokens, at most {_MAX_TOKENS:,} in a "
        f"batch, small ones more often), each once, in a random order, from one thread per stream; {result['about']}",
        "Resident memory of the process: tokenizer, both copies of the graph, NumPy, Python. Peak is the highest value so far",
    ]
    rows = [["loaded", *map(format_number, result["loaded"].values())]]
    done = 0
    for step in result["steps"]:
        done += step["shapes"]
        rows.append([f"{done:,}", format_number(step["resident_mib"]), format_number(step["peak_mib"])])
    warm, end = result["steps"][_WARM_UP_STEPS - 1], result["steps"][-1]
    growth = end["resident_mib"] - warm["resident_mib"]
    return "\n\n".join(
        [
            "# Memory",
            describe_run("benchmarks.memory", notes),
            "## Resident memory by number of shapes",
            markdown_table(["Shapes", "resident, MiB", "peak, MiB"], rows),
            f"From shape {rows[_WARM_UP_STEPS][0]} to the last one: {growth:+.1f} MiB resident "
            f"({100 * growth / warm['resident_mib']:+.1f} %), {end['peak_mib'] - warm['peak_mib']:+.1f} MiB at the peak.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
