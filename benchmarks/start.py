"""Measures how long servers take to start, and their memory."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import QUICK_HELP
from benchmarks.contenders import OURS, SERVERS, Server, alternate, make_contender, peer_notes, stop_servers_on_sigterm
from benchmarks.load import closed_loop
from benchmarks.report import describe_run, format_spread, log_progress, markdown_table, ratios
from benchmarks.resources import tree_resident_mib
from benchmarks.texts import Corpus
from benchmarks.workloads import WORKLOADS, request_body, write_bodies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.contenders import Contender

FIRST_START = "first start"
"""Suffix of the name of our service for a start with an empty cache, which compiles and verifies the model."""
_LOADS = ("short-64", "doc-64", "doc32-4")


@dataclass(frozen=True, slots=True)
class Config:
    """Load and pauses of each start."""

    seconds: float
    """Duration of each load."""
    settle_s: float
    """Pause before memory is read."""
    loads: dict[str, Path]
    """Bodies by workload."""
    first_body: str
    """Body of the request for the first vector."""


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a server."""

    first_vector_s: float
    idle_mib: float
    loaded_mib: float
    answered: int
    errors: int


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse_options(arguments)
    stop_servers_on_sigterm()
    names = options.contenders.split(",")
    rounds, seconds = (1, 0.3) if options.quick else (options.rounds, options.seconds)
    starts: dict[str, list[Start]] = {}
    with tempfile.TemporaryDirectory(prefix="benchmarks-start-") as directory:
        scratch, corpus = Path(directory), Corpus()
        contenders = [make_contender(name) for name in names]
        config = Config(
            seconds=seconds,
            settle_s=0.2 if options.quick else 2.0,
            loads=_write_bodies(scratch, corpus, seconds, quick=options.quick),
            first_body=request_body(corpus.texts("short", 1), "base64"),
        )
        for index, contender in enumerate(contenders):
            # Each server is started once in advance: ours compiles its model, and all files enter the page cache.
            log_progress(f"first start of {contender.name}")
            if contender.name not in OURS:
                with Server(contender, scratch) as server:
                    server.time_to_first_vector(config.first_body)
                continue
            fresh = make_contender(contender.name, cache=scratch / f"cache-{contender.name}")
            starts[f"{contender.name}, {FIRST_START}"] = [_measure(fresh, scratch, config)]
            if options.quick:
                contenders[index] = fresh  # its model is compiled
                continue
            with Server(contender, scratch) as server:
                server.wait()
        for number in range(rounds):
            for contender in alternate(contenders, number):
                log_progress(f"round {number + 1}/{rounds}: {contender.name}")
                start = _measure(contender, scratch, config)
                starts.setdefault(contender.name, []).append(start)
                log_progress(
                    f"  first vector after {start.first_vector_s:.1f} s, {start.idle_mib:.0f} MiB, "
                    f"{start.loaded_mib:.0f} MiB after the load"
                )
    notes = [
        f"{rounds} round(s), contenders alternate; all files are in the page cache; a request with one short text is sent "
        "every 10 ms from the start of the process",
        f"`{FIRST_START}`: with an empty cache, so the model is compiled and verified first; later starts use the compiled form",
        f"Resident memory of the process tree: idle is after the first vector, loaded is after {seconds:g} s each of "
        f"{', '.join(WORKLOADS[name].title for name in _LOADS)}",
        *peer_notes(names),
    ]
    print(_report(names, starts, notes))
    return 1 if any(not start.answered for name in names for start in starts[name]) else 0


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__)
    parser.add_argument("--contenders", default="ours,infinity,infinity-bf16,naive",
                        help=f"separated by commas, from {', '.join(SERVERS)} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0,
                        help="duration of each load, after which memory is read again; the loads are "
                             f"{', '.join(_LOADS)} (default: %(default)g)")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    return parser.parse_args(arguments)


def _write_bodies(scratch: Path, corpus: Corpus, seconds: float, *, quick: bool) -> dict[str, Path]:
    bodies = {}
    for name in _LOADS[:1] if quick else _LOADS:
        workload = WORKLOADS[name]
        count = 64 if quick else workload.connections + int(workload.max_rate * seconds)
        bodies[name] = write_bodies(scratch / name, corpus, workload.kind, workload.texts, count, "base64")
    return bodies


def _measure(contender: Contender, scratch: Path, config: Config) -> Start:
    with Server(contender, scratch) as server:
        first_vector_s = server.time_to_first_vector(config.first_body)
        time.sleep(config.settle_s)
        idle_mib = tree_resident_mib(server.pid)
        results = [
            closed_loop(server, bodies, connections=WORKLOADS[name].connections, seconds=config.seconds)
            for name, bodies in config.loads.items()
        ]
        time.sleep(config.settle_s)
        return Start(
            first_vector_s=first_vector_s,
            idle_mib=idle_mib,
            loaded_mib=tree_resident_mib(server.pid),
            answered=sum(result.ok for result in results),
            errors=sum(sum(result.errors.values()) for result in results),
        )


def _report(names: Sequence[str], starts: dict[str, list[Start]], notes: Sequence[str]) -> str:
    rows = [
        [
            name,
            format_spread([start.first_vector_s for start in of_name]),
            format_spread([start.idle_mib for start in of_name]),
            format_spread([start.loaded_mib for start in of_name]),
            str(sum(start.answered for start in of_name)),
            str(sum(start.errors for start in of_name)),
        ]
        for name, of_name in starts.items()
    ]
    head = ["Server", "first vector, s", "idle, MiB", "after the load, MiB", "answered", "errors"]
    parts = [
        "# Startup",
        describe_run("benchmarks.start", notes),
        "## Startup time and memory\n\nMedian of the rounds (lowest–highest).",
        markdown_table(head, rows),
    ]
    ours = next((name for name in names if name in OURS), None)
    others = [name for name in names if name != ours]
    if ours is not None and others:
        table = _ratio_table(ours, others, starts)
        parts += ["## As ratios\n\nRatios within each round; lower is better.", table]
    return "\n\n".join(parts)


def _ratio_table(ours: str, others: Sequence[str], starts: dict[str, list[Start]]) -> str:
    def column(name: str, field: str) -> list[float]:
        return [getattr(start, field) for start in starts[name]]

    fields = {"first vector": "first_vector_s", "idle": "idle_mib", "after the load": "loaded_mib"}
    return markdown_table(
        ["", *(f"{ours} ÷ {other}" for other in others)],
        [
            [title, *(format_spread(ratios(column(ours, field), column(other, field))) for other in others)]
            for title, field in fields.items()
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
