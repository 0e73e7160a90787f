"""Measures the latency of small requests while large requests run."""

from __future__ import annotations

import argparse
import math
import re
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import QUICK_HELP
from benchmarks.contenders import OURS, Server, check_names, make_contender, stop_servers_on_sigterm
from benchmarks.load import closed_loop, open_loop
from benchmarks.report import NONE, describe_run, format_counts, format_spread, log_progress, markdown_table
from benchmarks.texts import Corpus
from benchmarks.workloads import write_bodies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.load import Result
    from benchmarks.texts import Kind

MAX_INPUTS = 2048
"""Inputs of a large request: the most that the API allows."""
_LARGE: dict[str, tuple[str, Kind, str]] = {
    "short-base64": ("short texts, base64", "short", "base64"),
    "short-float": ("short texts, float", "short", "float"),
    "doc-base64": ("documents, base64", "doc", "base64"),
    "doc-float": ("documents, float", "doc", "float"),
}
"""Large requests: name to title, kind of texts and encoding."""
_LARGE_BODIES = 4
"""Different large requests of each kind, which are sent in turn."""
_LEAD_S = 1.0
"""Time between the first large request and the first small one, in seconds."""


@dataclass(frozen=True, slots=True)
class Config:
    """Rounds, duration and requests of a run."""

    rounds: int
    seconds: float
    rate: float
    """Small requests per second."""
    inputs: int
    """Inputs of a large request."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Small requests during one kind of large requests, in one round."""

    batch_s: float
    """Mean time of a batch of the large requests without other requests."""
    large_s: float
    """Mean time of a large request without other requests."""
    singles: Result

    @property
    def ratio(self) -> float:
        return self.singles.latency_ms.get("p99", math.nan) / 1000 / self.batch_s


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse_options(arguments)
    kinds = options.large.split(",")
    check_names(kinds, _LARGE, "large request")
    stop_servers_on_sigterm()
    if options.quick:
        config = Config(rounds=1, seconds=1.0, rate=options.rate, inputs=64)
    else:
        config = Config(options.rounds, options.seconds, options.rate, MAX_INPUTS)
    idle: list[Result] = []
    samples: dict[str, list[Sample]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory(prefix="benchmarks-fairness-") as directory:
        scratch, corpus = Path(directory), Corpus()
        requests = int(config.rate * config.seconds) + 100
        singles = write_bodies(scratch / "singles", corpus, "short", 1, requests, "base64")
        large = {
            kind: write_bodies(scratch / kind, corpus, _LARGE[kind][1], config.inputs, _LARGE_BODIES, _LARGE[kind][2])
            for kind in kinds
        }
        with Server(make_contender(options.contender), scratch) as server:
            server.wait()
            closed_loop(server, singles, connections=4, seconds=min(2.0, config.seconds))
            for number in range(config.rounds):
                log_progress(f"round {number + 1}/{config.rounds}: no large requests")
                idle.append(open_loop(server, singles, rate=config.rate, seconds=config.seconds, seed=number))
                for kind in kinds:
                    sample = _measure(server, singles, large[kind], config, seed=number)
                    samples[kind].append(sample)
                    log_progress(
                        f"  {kind}: batch {sample.batch_s * 1000:.1f} ms, latency {sample.singles.latency_ms}, "
                        f"errors {sample.singles.errors}"
                    )
    print(_report(idle, samples, config))
    results = idle + [sample.singles for of_kind in samples.values() for sample in of_kind]
    return 1 if any(result.errors or not result.ok for result in results) else 0


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fairness", description=__doc__)
    parser.add_argument("--contender", choices=list(OURS), default="ours", help="(default: %(default)s)")
    parser.add_argument("--large", default=",".join(_LARGE),
                        help="kinds of large requests, separated by commas (default: %(default)s)")  # fmt: skip
    parser.add_argument("--rate", type=float, default=20.0, help="small requests per second (default: %(default)g)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=50.0, help="duration of a measurement (default: %(default)g)")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    return parser.parse_args(arguments)


def _measure(server: Server, singles: Path, large: Path, config: Config, *, seed: int) -> Sample:
    """Measure large requests alone, then small requests while large ones follow each other."""
    before = _batch_times(server)
    alone = closed_loop(server, large, connections=1, seconds=min(5.0, config.seconds))
    after = _batch_times(server)
    with ThreadPoolExecutor(1) as pool:
        background = pool.submit(closed_loop, server, large, connections=1, seconds=config.seconds + 2 * _LEAD_S)
        time.sleep(_LEAD_S)
        result = open_loop(server, singles, rate=config.rate, seconds=config.seconds, seed=seed)
        errors = background.result().errors
    if errors or alone.errors:
        raise RuntimeError(f"Large requests failed: {alone.errors}, {errors}")
    return Sample(
        batch_s=(after[0] - before[0]) / (after[1] - before[1]), large_s=alone.latency_ms["mean"] / 1000, singles=result
    )


def _batch_times(server: Server) -> tuple[float, float]:
    """Return the total time of all batches so far in seconds, and their number."""
    metrics = server.get("/metrics")

    def value(name: str) -> float:
        match = re.search(rf"^{name}\{{.*\}} (\S+)$", metrics, re.MULTILINE)
        return float(match.group(1)) if match else 0.0

    return value("emb_provider_inference_seconds_sum"), value("emb_provider_inference_seconds_count")


def _report(idle: Sequence[Result], samples: dict[str, list[Sample]], config: Config) -> str:
    notes = [
        f"{config.rounds} round(s) of {config.seconds:g} s: single short texts at random times, {config.rate:g} per second, "
        f"while requests of {config.inputs} inputs follow each other on another connection without a pause",
        "The time of a batch is the mean over the batches of large requests without other requests "
        "(`emb_provider_inference_seconds`); a model with two streams runs two batches at the same time",
        f"{sum(result.ok for result in idle)} responses in the first row",
    ]
    rows = [["none", NONE, NONE, *_latency_cells(idle), NONE, _errors_cell(idle)]]
    for kind, of_kind in samples.items():
        results = [sample.singles for sample in of_kind]
        rows.append(
            [
                f"{config.inputs} {_LARGE[kind][0]}",
                format_spread([sample.large_s for sample in of_kind]),
                format_spread([sample.batch_s * 1000 for sample in of_kind]),
                *_latency_cells(results),
                format_spread([sample.ratio for sample in of_kind]),
                _errors_cell(results),
            ]
        )
    head = [
        "load", "large request, s", "batch, ms", "p50, ms", "p95, ms", "p99, ms", "p99 ÷ batch", "errors",
    ]  # fmt: skip
    return "\n\n".join(
        [
            "# Small requests during large requests",
            describe_run("benchmarks.fairness", notes),
            "## Latency of single short texts\n\nMedian of the rounds (lowest–highest).",
            markdown_table(head, rows),
        ]
    )


def _latency_cells(results: Sequence[Result]) -> list[str]:
    return [
        format_spread([result.latency_ms.get(percentile, math.nan) for result in results])
        for percentile in ("p50", "p95", "p99")
    ]


def _errors_cell(results: Sequence[Result]) -> str:
    total: Counter[str] = Counter()
    for result in results:
        total.update(result.errors)
    return format_counts(total)


if __name__ == "__main__":
    sys.exit(main())
