"""How quick a small request is while a large one runs. `python -m benchmarks.fairness --help`."""

from __future__ import annotations

import argparse
import http.client
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

from benchmarks.contenders import OURS, Server, contender, stop_servers_on_sigterm
from benchmarks.load import closed_loop, open_loop
from benchmarks.machine import machine_lines
from benchmarks.progress import say
from benchmarks.table import spread, table
from benchmarks.texts import Corpus
from benchmarks.workloads import write_bodies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.load import Result
    from benchmarks.texts import Kind

INPUTS = 2048
"""The most that the API allows in a request."""
_LARGE: dict[str, tuple[str, Kind, str]] = {
    "short-base64": ("short texts, base64", "short", "base64"),
    "short-float": ("short texts, float", "short", "float"),
    "doc-base64": ("documents, base64", "doc", "base64"),
    "doc-float": ("documents, float", "doc", "float"),
}
"""What the large requests hold, and in which encoding they are answered."""
_DIFFERENT = 4
"""Large requests of each kind, sent in turn."""
_START_S = 300.0
_HEAD_START_S = 1.0
"""From the first large request to the first single one."""


@dataclass(frozen=True, slots=True)
class Seen:
    """Single short texts beside one kind of large request, or alone."""

    batch_s: float
    """A model batch of the large requests, the mean of all of them, while nothing else is asked."""
    large_s: float
    """A whole large request, the mean, while nothing else is asked."""
    singles: Result

    @property
    def ratio(self) -> float:
        return self.singles.latency_ms.get("p99", math.nan) / 1000 / self.batch_s


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    stop_servers_on_sigterm()
    inputs, rounds, seconds = (64, 1, 1.0) if options.quick else (INPUTS, options.rounds, options.seconds)
    kinds = options.large.split(",")
    if unknown := [kind for kind in kinds if kind not in _LARGE]:
        raise SystemExit(f"error: no large request is called {unknown[0]!r}.")
    idle: list[Result] = []
    seen: dict[str, list[Seen]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory(prefix="benchmarks-fairness-") as directory:
        scratch, corpus = Path(directory), Corpus()
        singles = write_bodies(
            scratch / "singles", corpus, "short", 1, int(options.rate * seconds) + 100, "base64"
        )
        large = {
            kind: write_bodies(scratch / f"large-{place}", corpus, _LARGE[kind][1], inputs, _DIFFERENT, _LARGE[kind][2])
            for place, kind in enumerate(kinds)
        }  # fmt: skip
        with Server(contender(options.contender), scratch) as server:
            server.wait(_START_S)
            closed_loop(server, singles, connections=4, seconds=min(2.0, seconds))
            for turn in range(rounds):
                say(f"round {turn + 1}/{rounds}: idle")
                idle.append(open_loop(server, singles, rate=options.rate, seconds=seconds, seed=turn))
                for kind in kinds:
                    one = _beside(server, singles, large[kind], rate=options.rate, seconds=seconds, seed=turn)
                    seen[kind].append(one)
                    say(
                        f"  beside {kind}: batch {one.batch_s * 1000:.1f} ms, {one.singles.latency_ms}, errors {one.singles.errors}"
                    )
    print(_report(idle, seen, rate=options.rate, seconds=seconds, rounds=rounds, inputs=inputs))
    results = idle + [one.singles for all_of_kind in seen.values() for one in all_of_kind]
    return 1 if any(result.errors or not result.ok for result in results) else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fairness", description=__doc__)
    parser.add_argument("--contender", choices=list(OURS), default="ours")
    parser.add_argument("--large", default=",".join(_LARGE), help="large requests (default: %(default)s)")
    parser.add_argument(
        "--rate", type=float, default=20.0, help="single texts a second (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=50.0, help="of each measurement")
    parser.add_argument("--quick", action="store_true",
                        help="tiny: does everything work? Its figures mean nothing")  # fmt: skip
    return parser.parse_args(arguments)


def _beside(server: Server, singles: Path, large: Path, *, rate: float, seconds: float, seed: int) -> Seen:
    """Measure large requests alone, then single ones while large ones follow each other."""
    before = _batches(server)
    alone = closed_loop(server, large, connections=1, seconds=min(5.0, seconds))
    after = _batches(server)
    with ThreadPoolExecutor(1) as pool:
        behind = pool.submit(closed_loop, server, large, connections=1, seconds=seconds + 2 * _HEAD_START_S)
        time.sleep(_HEAD_START_S)
        result = open_loop(server, singles, rate=rate, seconds=seconds, seed=seed)
        errors = behind.result().errors
    if errors or alone.errors:
        raise RuntimeError(f"large requests were not answered: {alone.errors}, {errors}")
    return Seen(
        batch_s=(after[0] - before[0]) / (after[1] - before[1]),
        large_s=alone.latency_ms["mean"] / 1000,
        singles=result,
    )


def _batches(server: Server) -> tuple[float, float]:
    """Return the seconds that all model batches took so far, and their number."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
    finally:
        connection.close()
    found = [re.search(rf"^emb_provider_inference_seconds_{part}\{{.*\}} (\S+)$", text, re.MULTILINE) for part in ("sum", "count")]  # fmt: skip
    seconds, batches = (float(match.group(1)) if match else 0.0 for match in found)
    return seconds, batches


def _report(
    idle: Sequence[Result], seen: dict[str, list[Seen]], *, rate: float, seconds: float, rounds: int, inputs: int
) -> str:  # fmt: skip
    notes = [
        f"{rounds} round(s) of {seconds:g} s: single short texts at random times, {rate:g} a second, each a request of its own, "
        f"while requests of {inputs} inputs follow each other on another connection without a pause",
        "Model batch: the mean over all batches of the large requests (`emb_provider_inference_seconds`) while nothing else is asked; "
        "two run at a time where the model has two lanes",
        f"{sum(result.ok for result in idle)} single texts answered in the first row",
    ]
    rows = [["nothing else", "–", "–", *_latencies(idle), "–", _errors(idle)]]
    for kind, all_of_kind in seen.items():
        results = [one.singles for one in all_of_kind]
        rows.append(
            [
                f"{inputs} {_LARGE[kind][0]}",
                spread([one.large_s for one in all_of_kind]),
                spread([one.batch_s * 1000 for one in all_of_kind]),
                *_latencies(results),
                spread([one.ratio for one in all_of_kind]),
                _errors(results),
            ]
        )
    head = [
        "Beside",
        "large request, s",
        "batch, ms",
        "p50, ms",
        "p95, ms",
        "p99, ms",
        "p99 ÷ batch",
        "errors",
    ]
    return "\n\n".join(
        [
            "# A small request beside a large one",
            "\n".join(machine_lines("benchmarks.fairness", notes)),
            "## Latency of single short texts\n\nMedian of the rounds (lowest–highest).",
            table(head, rows),
        ]
    )


def _latencies(results: Sequence[Result]) -> list[str]:
    return [
        spread([result.latency_ms.get(share, math.nan) for result in results])
        for share in ("p50", "p95", "p99")
    ]


def _errors(results: Sequence[Result]) -> str:
    """Return how many requests were not answered with 200, by status or reason."""
    total: Counter[str] = Counter()
    for result in results:
        total.update(result.errors)
    return ", ".join(f"{count} × {reason}" for reason, count in sorted(total.items())) or "0"


if __name__ == "__main__":
    sys.exit(main())
