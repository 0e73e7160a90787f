"""How soon a server answers, and the memory it holds. `python -m benchmarks.start --help`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.contenders import INFINITY, OURS, SERVERS, Server, contender, stop_servers_on_sigterm
from benchmarks.load import closed_loop
from benchmarks.machine import machine_lines
from benchmarks.peers import infinity_environment, infinity_versions
from benchmarks.progress import say
from benchmarks.resources import resident_mib
from benchmarks.table import ratios, spread, table
from benchmarks.texts import Corpus
from benchmarks.workloads import WORKLOADS, body, write_bodies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.contenders import Contender

FIRST = "first start"
"""Added to the name of ours for a start with an empty cache: the model is compiled and checked first."""
_LOAD = ("short-64", "doc-64", "doc32-4")
_FIRST_S = 600.0


@dataclass(frozen=True, slots=True)
class Start:
    """One start of a server."""

    first_vector_s: float
    idle_mib: float
    loaded_mib: float
    answered: int
    errors: int


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    stop_servers_on_sigterm()
    names = options.contenders.split(",")
    rounds, seconds, settle = (1, 0.3, 0.2) if options.quick else (options.rounds, options.seconds, 2.0)
    starts: dict[str, list[Start]] = {}
    with tempfile.TemporaryDirectory(prefix="benchmarks-start-") as directory:
        scratch, corpus = Path(directory), Corpus()
        load = _bodies(scratch, corpus, seconds, quick=options.quick)
        contenders = [contender(name, infinity=options.infinity) for name in names]
        for place, one in enumerate(contenders):
            # Once beforehand: ours compiles at its first start, and files come into the page cache for everybody.
            say(f"starting {one.name} once")
            cache = scratch / f"cache-{one.name}"
            first = contender(one.name, cache=cache) if one.name in OURS else one
            seen = _start(first, scratch, corpus, load if one.name in OURS else {}, seconds, settle)
            if one.name in OURS:
                starts[f"{one.name}, {FIRST}"] = [seen]
                if options.quick:
                    contenders[place] = first  # which need not be compiled once more
                    continue
                with Server(one, scratch) as server:
                    server.wait(_FIRST_S)
        for number in range(rounds):
            turn = number % len(contenders)
            for one in contenders[turn:] + contenders[:turn]:
                say(f"round {number + 1}/{rounds}: {one.name}")
                seen = _start(one, scratch, corpus, load, seconds, settle)
                starts.setdefault(one.name, []).append(seen)
                say(
                    f"  first vector after {seen.first_vector_s:.1f} s, {seen.idle_mib:.0f} MiB, {seen.loaded_mib:.0f} MiB after the load"
                )
    print(_report(names, starts, rounds, seconds, options.infinity))
    return 1 if any(not start.answered for name in names for start in starts[name]) else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.start", description=__doc__)
    parser.add_argument("--contenders", default="ours,infinity,infinity-bf16,naive",
                        help=f"of {', '.join(SERVERS)} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5.0,
                        help=f"of each load before memory is read again ({', '.join(_LOAD)})")  # fmt: skip
    parser.add_argument("--infinity", type=Path, metavar="DIRECTORY",
                        help="a virtual environment with infinity (default: one is made)")  # fmt: skip
    parser.add_argument("--quick", action="store_true",
                        help="tiny: does everything work? Its figures mean nothing")  # fmt: skip
    return parser.parse_args(arguments)


def _bodies(scratch: Path, corpus: Corpus, seconds: float, *, quick: bool) -> dict[str, Path]:
    loads = {}
    for name in _LOAD[:1] if quick else _LOAD:
        one = WORKLOADS[name]
        count = 64 if quick else one.connections + int(one.ceiling * seconds)
        loads[name] = write_bodies(scratch / name, corpus, one.kind, one.texts, count, "base64")
    return loads


def _start(
    one: Contender, scratch: Path, corpus: Corpus, load: dict[str, Path], seconds: float, settle: float
) -> Start:
    text = body(corpus.texts("short", 1), "base64")
    with Server(one, scratch) as server:
        took = server.first_vector(text, _FIRST_S)
        time.sleep(settle)
        idle = resident_mib(server.pid)
        results = [
            closed_loop(server, bodies, connections=WORKLOADS[name].connections, seconds=seconds)
            for name, bodies in load.items()
        ]
        time.sleep(settle)
        return Start(
            first_vector_s=took,
            idle_mib=idle,
            loaded_mib=resident_mib(server.pid),
            answered=sum(result.ok for result in results),
            errors=sum(sum(result.errors.values()) for result in results),
        )


def _report(
    names: Sequence[str], starts: dict[str, list[Start]], rounds: int, seconds: float, infinity: Path | None
) -> str:
    notes = [
        f"{rounds} round(s), contenders in turn; all files in the page cache; asked every 10 ms for the vector of one "
        "short text from the moment the process is started",
        f"`{FIRST}`: with an empty cache, so the model is compiled and checked first; later starts read what that made",
        f"Resident memory of the whole process tree: idle is after the first vector, loaded is after {seconds:g} s each "
        f"of {', '.join(WORKLOADS[name].title for name in _LOAD)}",
    ]
    if any(name in INFINITY for name in names):
        notes.append(f"infinity's environment: {infinity_versions(infinity_environment(infinity))}")
    rows = [
        [
            name,
            spread([start.first_vector_s for start in found]),
            spread([start.idle_mib for start in found]),
            spread([start.loaded_mib for start in found]),
            str(sum(start.answered for start in found)),
            str(sum(start.errors for start in found)),
        ]
        for name, found in starts.items()
    ]
    head = ["Server", "first vector, s", "idle, MiB", "after the load, MiB", "answered", "errors"]
    parts = [
        "# Starting",
        "\n".join(machine_lines("benchmarks.start", notes)),
        "## Start and memory\n\nMedian of the rounds (lowest–highest).",
        table(head, rows),
    ]
    ours = next((name for name in names if name in OURS), None)
    others = [name for name in names if name != ours]
    if ours is not None and others:
        parts += ["## As ratios\n\nTaken within each round; lower is better.", _ratios(ours, others, starts)]
    return "\n\n".join(parts)


def _ratios(ours: str, others: Sequence[str], starts: dict[str, list[Start]]) -> str:
    def column(name: str, what: str) -> list[float]:
        return [getattr(start, what) for start in starts[name]]

    measures = {"first vector": "first_vector_s", "idle": "idle_mib", "after the load": "loaded_mib"}
    return table(
        ["", *(f"{ours} ÷ {other}" for other in others)],
        [
            [title, *(spread(ratios(column(ours, what), column(other, what))) for other in others)]
            for title, what in measures.items()
        ],
    )


if __name__ == "__main__":
    sys.exit(main())
