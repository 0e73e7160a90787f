"""Servers beside each other: the same bodies, in turn, several rounds. `python -m benchmarks.serve --help`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.contenders import OURS, SERVERS, SERVICE_CACHE, Server, contender, stop_servers_on_sigterm
from benchmarks.inprocess import measure
from benchmarks.load import Result, closed_loop, has_wrk, open_loop
from benchmarks.progress import say
from benchmarks.reference import Agreement, Reference, reference
from benchmarks.serve_report import report
from benchmarks.texts import Corpus
from benchmarks.workloads import OPEN_CEILING, OPEN_LOOPS, WORKLOADS, Bodies, Workload, write_bodies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.contenders import Contender
    from benchmarks.load import Generator

ENGINE = "engine"
"""Not a server: ours without HTTP, in process, with the same bodies."""
COMPILE_S = 300.0
_LONGEST_FACTOR = 6
"""A measurement of a slow contender is made longer, up to this many times."""
_LATENCIES = 10
"""A closed loop lasts at least as long as this many requests on each connection."""
_OPEN_SAMPLES = 1000
_SAMPLE = {"short": 8, "doc": 16}


@dataclass(frozen=True, slots=True)
class Run:
    """One measurement."""

    contender: str
    workload: str
    round: int
    result: Result
    offered: float | None = None
    """Requests a second that an open loop sent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured, and how."""

    contenders: tuple[Contender, ...]
    engine: bool
    workloads: tuple[Workload, ...]
    open_loops: tuple[str, ...]
    rounds: int
    seconds: float
    warm_up_s: float
    load_share: float
    encoding: str
    generator: Generator
    bodies: dict[str, Bodies]
    sample: Reference
    scratch: Path

    @property
    def names(self) -> list[str]:
        return [one.name for one in self.contenders] + ([ENGINE] if self.engine else [])


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    stop_servers_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="benchmarks-serve-") as directory:
        plan = _plan(options, Path(directory))
        if not options.quick:
            _warm_artifacts(plan)
        runs, agreements = _rounds(plan)
        print(report(plan, runs, agreements, options.infinity))
    if options.json is not None:
        rows = [asdict(run) | {"rate": run.result.rate} for run in runs]
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 1 if any(run.result.ok == 0 for run in runs) else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("--contenders", default="ours,infinity,infinity-bf16,naive,engine",
                        help=f"of {', '.join([*SERVERS, ENGINE])} (default: %(default)s)")  # fmt: skip
    parser.add_argument(
        "--workloads", default=",".join([*WORKLOADS, *OPEN_LOOPS]), help="default: %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0,
                        help=f"a measurement; up to {_LONGEST_FACTOR} times as long for slow contenders")  # fmt: skip
    parser.add_argument("--load", type=float, default=0.7,
                        help="of the open loops, as a share of the closed loops' rate (default: %(default)s)")  # fmt: skip
    parser.add_argument("--encoding", choices=["base64", "float"], default="base64",
                        help="encoding_format; the OpenAI SDK's own is base64 (default)")  # fmt: skip
    parser.add_argument("--generator", choices=["auto", "wrk", "own"], default="auto",
                        help="of the closed loops; auto: wrk for single short texts where it is installed, else own")  # fmt: skip
    parser.add_argument("--infinity", type=Path, metavar="DIRECTORY",
                        help="a virtual environment with infinity (default: one is made)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every measurement here")
    parser.add_argument("--quick", action="store_true",
                        help="tiny: does everything work? Its times mean nothing")  # fmt: skip
    return parser.parse_args(arguments)


def _plan(options: argparse.Namespace, scratch: Path) -> Plan:
    names = options.contenders.split(",")
    workloads = [name for name in options.workloads.split(",") if name not in OPEN_LOOPS]
    if unknown := [name for name in workloads if name not in WORKLOADS]:
        raise SystemExit(f"error: no workload is called {unknown[0]!r}.")
    if options.generator == "wrk" and not has_wrk():
        raise SystemExit("error: wrk is not installed: apt-get install wrk, or --generator own.")
    seconds, chosen = options.seconds, [WORKLOADS[name] for name in workloads]
    if options.quick:
        seconds = 0.3
        chosen = [
            dataclasses.replace(one, texts=min(one.texts, 3), connections=max(1, one.connections // 8))
            for one in chosen
        ]
    contenders = tuple(contender(name, infinity=options.infinity) for name in names if name != ENGINE)
    open_loops = tuple(name for name in options.workloads.split(",") if name in OPEN_LOOPS)
    corpus = Corpus()
    say("drawing texts")
    bodies = {
        one.name: _bodies(scratch, corpus, one, seconds, options.encoding, quick=options.quick)
        for one in chosen
    }
    for name in open_loops:
        kind = OPEN_LOOPS[name]
        one = Workload(name=name, kind=kind, texts=1, connections=16, ceiling=OPEN_CEILING[kind])
        bodies[name] = _bodies(scratch, corpus, one, seconds, options.encoding, quick=options.quick)
    say("computing the reference: sentence-transformers at fp32")
    sample = [text for kind, count in _SAMPLE.items() for text in corpus.texts(kind, count)]  # type: ignore[arg-type]  # the keys are of Kind
    return Plan(
        contenders=contenders,
        engine=ENGINE in names,
        workloads=tuple(chosen),
        open_loops=open_loops,
        rounds=1 if options.quick else options.rounds,
        seconds=seconds,
        warm_up_s=0.1 if options.quick else min(2.0, seconds / 2),
        load_share=options.load,
        encoding=options.encoding,
        generator=options.generator,
        bodies=bodies,
        sample=reference(sample, scratch),
        scratch=scratch,
    )


def _bodies(
    scratch: Path, corpus: Corpus, workload: Workload, seconds: float, encoding: str, *, quick: bool
) -> Bodies:
    # wrk runs whole seconds.
    count = 200 if quick else workload.connections + math.ceil(workload.ceiling * math.ceil(seconds))
    warm = 50 if quick else workload.connections + math.ceil(count / 3)
    paths = [
        write_bodies(
            scratch / f"{workload.name}.{part}", corpus, workload.kind, workload.texts, number, encoding
        )
        for part, number in (("measured", count), ("warm-up", warm))
    ]
    return Bodies(*paths)


def _warm_artifacts(plan: Plan) -> None:
    """Start our servers once, so that no measured start has to compile."""
    for one in plan.contenders:
        if one.name in OURS:
            with Server(one, plan.scratch) as server:
                say(f"starting {one.name} once: a first start compiles the model")
                server.wait(COMPILE_S)
                say(
                    f"{one.name} was ready after {time.perf_counter() - server.started:.1f} s at its first start"
                )


def _rounds(plan: Plan) -> tuple[list[Run], dict[str, list[Agreement]]]:
    runs: list[Run] = []
    agreements: dict[str, list[Agreement]] = {}
    everyone: list[Contender | None] = [*plan.contenders, *([None] if plan.engine else [])]
    for number in range(plan.rounds):
        # Another one goes first in each round, so that no one always follows the same neighbour.
        turn = number % len(everyone)
        for one in everyone[turn:] + everyone[:turn]:
            if one is None:
                say(f"round {number + 1}/{plan.rounds}: {ENGINE}")
                runs += _engine_runs(plan, number)
                continue
            say(f"round {number + 1}/{plan.rounds}: starting {one.name}")
            with Server(one, plan.scratch) as server:
                server.wait(COMPILE_S)
                agreements.setdefault(one.name, []).append(plan.sample.check(server, plan.encoding))
                runs += _server_runs(plan, server, number)
    return runs, agreements


def _server_runs(plan: Plan, server: Server, number: int) -> list[Run]:
    runs: list[Run] = []
    for workload in plan.workloads:
        result = _closed(plan, server, workload)
        runs.append(Run(server.contender.name, workload.name, number, result))
        _say_result(runs[-1])
    for name in plan.open_loops:
        kind, bodies = OPEN_LOOPS[name], plan.bodies[name]
        warm = closed_loop(server, bodies.warm_up, connections=16, seconds=plan.warm_up_s)
        singles = [one.name for one in plan.workloads if one.kind == kind and one.texts == 1]
        reached = [run.result.rate for run in runs if run.workload in singles] or [warm.rate]
        rate = plan.load_share * max(reached)
        if not rate:
            raise RuntimeError(f"{server.contender.name} answered nothing: {warm.errors}")
        seconds = min(max(plan.seconds, _OPEN_SAMPLES / rate), _LONGEST_FACTOR * plan.seconds)
        result = open_loop(server, bodies.measured, rate=rate, seconds=seconds, seed=number)
        runs.append(Run(server.contender.name, name, number, result, offered=rate))
        _say_result(runs[-1])
    return runs


def _closed(plan: Plan, server: Server, workload: Workload) -> Result:
    bodies = plan.bodies[workload.name]
    warm = closed_loop(server, bodies.warm_up, connections=workload.connections, seconds=plan.warm_up_s)
    # The slower the answers, the longer the measurement: else its ends, where not all is under way, weigh too much.
    enough = _LATENCIES * warm.latency_ms.get("mean", 0.0) / 1000
    seconds = min(max(plan.seconds, enough), _LONGEST_FACTOR * plan.seconds)
    generator = plan.generator
    if generator == "auto":
        single = workload.texts == 1 and workload.kind == "short"
        generator = "wrk" if single and has_wrk() else "own"
    return closed_loop(
        server, bodies.measured, connections=workload.connections, seconds=seconds, generator=generator
    )


def _engine_runs(plan: Plan, number: int) -> list[Run]:
    job: dict[str, Any] = {
        "kind": "engine",
        "settings": {"cache_dir": str(SERVICE_CACHE)},
        "seconds": plan.seconds,
        "warm_up_s": plan.warm_up_s,
        "cases": [
            {"name": one.name, "bodies": str(plan.bodies[one.name].measured), "connections": one.connections}
            for one in plan.workloads
        ],
    }
    runs = []
    for name, seen in measure(job)["cases"].items():
        result = Result(generator="in process", errors={}, repeated=0, generator_cores=0.0, **seen)
        runs.append(Run(ENGINE, name, number, result))
        _say_result(runs[-1])
    return runs


def _say_result(run: Run) -> None:
    result, latency = run.result, run.result.latency_ms
    errors = f", errors {result.errors}" if result.errors else ""
    say(
        f"  {run.contender} {run.workload}: {result.rate:.1f}/s in {result.elapsed_s:.1f} s, "
        f"p50 {latency.get('p50', 0):.1f} ms, p99 {latency.get('p99', 0):.1f} ms{errors}"
    )


if __name__ == "__main__":
    sys.exit(main())
