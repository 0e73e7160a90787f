"""Compares servers: the same request bodies for each contender, in alternating order, over several rounds."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks import QUICK_HELP
from benchmarks.contenders import (
    OURS,
    SERVERS,
    SERVICE_CACHE,
    Server,
    alternate,
    check_names,
    make_contender,
    peer_notes,
    stop_servers_on_sigterm,
)
from benchmarks.inprocess import measure
from benchmarks.load import Result, closed_loop, has_wrk, open_loop
from benchmarks.reference import Agreement, Reference, compute_reference
from benchmarks.report import (
    NONE,
    describe_run,
    format_counts,
    format_number,
    format_spread,
    log_progress,
    markdown_table,
    ratios,
)
from benchmarks.texts import Corpus, count_texts, describe_texts
from benchmarks.workloads import OPEN_LOOPS, WORKLOADS, Bodies, Workload, write_bodies

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.contenders import Contender
    from benchmarks.load import Generator
    from benchmarks.texts import Kind

ENGINE = "engine"
"""A contender that is not a server: the engine of our service in process, with the same bodies."""
_MAX_EXTENSION = 6
"""Measurements of slow contenders are extended, up to this many times."""
_MIN_LATENCIES = 10
"""A closed loop takes at least as long as this many requests on each connection."""
_OPEN_SAMPLES = 1000
_SAMPLE_TEXTS: dict[Kind, int] = {"short": 8, "doc": 16}
_DISTURBING_CORES = 0.1
_PERCENTILES = ("p50", "p95", "p99")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Rounds, durations and requests of a run."""

    rounds: int
    seconds: float
    """Shortest duration of a measurement."""
    warm_up_s: float
    load: float
    """Rate of the open loops, as a share of that of the closed loops."""
    encoding: str
    generator: Generator


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Contenders, workloads and request bodies of a run."""

    config: Config
    contenders: tuple[Contender, ...]
    engine: bool
    workloads: tuple[Workload, ...]
    open_loops: tuple[Workload, ...]
    bodies: dict[str, Bodies]
    """By workload."""
    sample: Reference
    scratch: Path

    @property
    def names(self) -> list[str]:
        return [contender.name for contender in self.contenders] + ([ENGINE] if self.engine else [])


@dataclass(frozen=True, slots=True)
class Run:
    """One measurement."""

    contender: str
    workload: str
    round: int
    result: Result
    offered: float | None = None
    """Requests per second of an open loop."""

    @property
    def is_disturbed(self) -> bool:
        return self.result.other_cores > _DISTURBING_CORES


@dataclass(frozen=True, slots=True)
class Results:
    """All measurements, and the agreement of each server with the reference in each round."""

    runs: list[Run] = field(default_factory=list)
    agreements: dict[str, list[Agreement]] = field(default_factory=dict)

    def add(self, run: Run) -> None:
        """Add a measurement and log it."""
        self.runs.append(run)
        result, latency = run.result, run.result.latency_ms
        errors = f", errors {result.errors}" if result.errors else ""
        log_progress(
            f"  {run.contender} {run.workload}: {result.rate:.1f}/s in {result.elapsed_s:.1f} s, "
            f"p50 {latency.get('p50', 0):.1f} ms, p99 {latency.get('p99', 0):.1f} ms{errors}"
        )

    def of(self, contender: str, workload: Workload) -> list[Run]:
        """Return the measurements of all rounds."""
        return [run for run in self.runs if (run.contender, run.workload) == (contender, workload.name)]

    def rates(self, contender: str, workload: Workload) -> list[float]:
        return [run.result.rate for run in self.of(contender, workload)]

    def medians(self, contender: str, workload: Workload) -> list[float]:
        """Return the median latencies of all rounds, in milliseconds."""
        return [run.result.latency_ms.get("p50", 0.0) for run in self.of(contender, workload)]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse_options(arguments)
    stop_servers_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="benchmarks-serve-") as directory:
        plan = _plan(options, Path(directory))
        if not options.quick:
            _compile_models(plan)
        results = _run_rounds(plan)
        notes = peer_notes(plan.names)
    print(_report(plan, results, notes))
    if options.json is not None:
        rows = [asdict(run) | {"rate": run.result.rate} for run in results.runs]
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    return 1 if any(run.result.ok == 0 for run in results.runs) else 0


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description=__doc__)
    parser.add_argument("--contenders", default="ours,infinity,infinity-bf16,naive,engine",
                        help=f"separated by commas, from {', '.join([*SERVERS, ENGINE])} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--workloads", default=",".join([*WORKLOADS, *OPEN_LOOPS]),
                        help="separated by commas (default: %(default)s)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0,
                        help="duration of a measurement; slow contenders are measured for up to "
                             f"{_MAX_EXTENSION} times as long (default: %(default)g)")  # fmt: skip
    parser.add_argument("--load", type=float, default=0.7,
                        help="rate of the open loops, as a share of that of the closed loops (default: %(default)s)")  # fmt: skip
    parser.add_argument("--encoding", choices=["base64", "float"], default="base64",
                        help="encoding_format of the requests; base64 is the default of the OpenAI SDK and of this option")  # fmt: skip
    parser.add_argument("--generator", choices=["auto", "wrk", "own"], default="auto",
                        help="load generator of the closed loops; auto uses wrk for single short texts if it is installed")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write all measurements to this file")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    return parser.parse_args(arguments)


# --- preparing ----------------------------------------------------------------------------------------------


def _plan(options: argparse.Namespace, scratch: Path) -> Plan:
    names, workload_names = options.contenders.split(","), options.workloads.split(",")
    check_names(names, [*SERVERS, ENGINE], "contender")
    check_names(workload_names, [*WORKLOADS, *OPEN_LOOPS], "workload")
    if options.generator == "wrk" and not has_wrk():
        raise SystemExit("error: wrk is not installed. Install it (apt-get install wrk) or use --generator own.")
    workloads = tuple(WORKLOADS[name] for name in workload_names if name in WORKLOADS)
    open_loops = tuple(OPEN_LOOPS[name] for name in workload_names if name in OPEN_LOOPS)
    if options.quick:
        workloads = tuple(_reduce(workload) for workload in workloads)
    seconds = 0.3 if options.quick else options.seconds
    config = Config(
        rounds=1 if options.quick else options.rounds,
        seconds=seconds,
        warm_up_s=0.1 if options.quick else min(2.0, seconds / 2),
        load=options.load,
        encoding=options.encoding,
        generator=options.generator,
    )
    contenders = [make_contender(name) for name in names if name != ENGINE]
    corpus = Corpus()
    log_progress("drawing texts")
    bodies = {
        workload.name: _write_bodies(scratch, corpus, workload, config, quick=options.quick)
        for workload in [*workloads, *open_loops]
    }
    log_progress("computing the reference: sentence-transformers at fp32")
    sample = [text for kind, count in _SAMPLE_TEXTS.items() for text in corpus.texts(kind, count)]
    return Plan(
        config=config,
        contenders=tuple(contenders),
        engine=ENGINE in names,
        workloads=workloads,
        open_loops=open_loops,
        bodies=bodies,
        sample=compute_reference(sample, scratch),
        scratch=scratch,
    )


def _reduce(workload: Workload) -> Workload:
    texts, connections = min(workload.texts, 3), max(1, workload.connections // 8)
    return dataclasses.replace(workload, texts=texts, connections=connections)


def _write_bodies(scratch: Path, corpus: Corpus, workload: Workload, config: Config, *, quick: bool) -> Bodies:
    # The seconds are rounded up, because wrk runs for whole seconds.
    measured = 200 if quick else workload.connections + workload.max_rate * math.ceil(config.seconds)
    warm_up = 50 if quick else workload.connections + math.ceil(measured / 3)

    def write(part: str, requests: int) -> Path:
        path = scratch / f"{workload.name}.{part}"
        return write_bodies(path, corpus, workload.kind, workload.texts, requests, config.encoding)

    return Bodies(write("measured", measured), write("warm-up", warm_up))


def _compile_models(plan: Plan) -> None:
    """Start each of our servers once, so that no measured start has to compile a model."""
    for contender in plan.contenders:
        if contender.name in OURS:
            log_progress(f"starting {contender.name} once, because the first start compiles the model")
            with Server(contender, plan.scratch) as server:
                server.wait()
                log_progress(f"{contender.name} was ready after {time.perf_counter() - server.started:.1f} s")


# --- measuring ----------------------------------------------------------------------------------------------


def _run_rounds(plan: Plan) -> Results:
    results = Results()
    contenders: list[Contender | None] = [*plan.contenders, *([None] if plan.engine else [])]
    for number in range(plan.config.rounds):
        for contender in alternate(contenders, number):
            name = contender.name if contender is not None else ENGINE
            log_progress(f"round {number + 1}/{plan.config.rounds}: {name}")
            if contender is None:
                _measure_engine(plan, results, number)
                continue
            with Server(contender, plan.scratch) as server:
                server.wait()
                agreement = plan.sample.check(server, plan.config.encoding)
                results.agreements.setdefault(name, []).append(agreement)
                _measure_server(plan, server, results, number)
    return results


def _measure_server(plan: Plan, server: Server, results: Results, number: int) -> None:
    config, name = plan.config, server.contender.name
    reached: dict[Kind, float] = {}  # highest rate with single texts
    for workload in plan.workloads:
        result = _closed_loop(plan, server, workload)
        results.add(Run(name, workload.name, number, result))
        if workload.texts == 1:
            reached[workload.kind] = max(reached.get(workload.kind, 0.0), result.rate)
    for workload in plan.open_loops:
        bodies = plan.bodies[workload.name]
        warm_up = closed_loop(server, bodies.warm_up, connections=workload.connections, seconds=config.warm_up_s)
        rate = config.load * reached.get(workload.kind, warm_up.rate)
        if not rate:
            raise RuntimeError(f"{name} has not responded with 200: {warm_up.errors}")
        seconds = min(max(config.seconds, _OPEN_SAMPLES / rate), _MAX_EXTENSION * config.seconds)
        result = open_loop(server, bodies.measured, rate=rate, seconds=seconds, seed=number)
        results.add(Run(name, workload.name, number, result, offered=rate))


def _closed_loop(plan: Plan, server: Server, workload: Workload) -> Result:
    config, bodies, connections = plan.config, plan.bodies[workload.name], workload.connections
    warm_up = closed_loop(server, bodies.warm_up, connections=connections, seconds=config.warm_up_s)
    # Slow responses need a longer measurement, because not all connections are busy at its end.
    minimum_s = _MIN_LATENCIES * warm_up.latency_ms.get("mean", 0.0) / 1000
    seconds = min(max(config.seconds, minimum_s), _MAX_EXTENSION * config.seconds)
    generator = config.generator
    if generator == "auto":
        is_single = workload.texts == 1 and workload.kind == "short"
        generator = "wrk" if is_single and has_wrk() else "own"
    return closed_loop(server, bodies.measured, connections=connections, seconds=seconds, generator=generator)


def _measure_engine(plan: Plan, results: Results, number: int) -> None:
    job: dict[str, Any] = {
        "kind": "engine",
        "settings": {"cache_dir": str(SERVICE_CACHE)},
        "seconds": plan.config.seconds,
        "warm_up_s": plan.config.warm_up_s,
        "cases": [
            {
                "name": workload.name,
                "bodies": str(plan.bodies[workload.name].measured),
                "connections": workload.connections,
            }
            for workload in plan.workloads
        ],
    }
    for name, case in measure(job)["cases"].items():
        result = Result(generator="in process", errors={}, repeated=0, generator_cores=0.0, **case)
        results.add(Run(ENGINE, name, number, result))


# --- reporting ----------------------------------------------------------------------------------------------


def _report(plan: Plan, results: Results, more_notes: Sequence[str]) -> str:
    config = plan.config
    notes = [
        *describe_texts("short", "doc"),
        f"{config.rounds} round(s), at least {config.seconds:g} s per measurement after a warm-up; a contender gets each "
        f"text once, except those counted as repeated; encoding_format {config.encoding}; all contenders get the same bytes",
        *more_notes,
    ]
    parts = [
        "# Serving",
        describe_run("benchmarks.serve", notes),
        "## Requests answered per second\n\nMedian of the rounds (lowest–highest), and the lowest cosine to "
        "sentence-transformers at fp32.",
        _comparison(plan, results, plan.names, results.rates),
        *_ratio_tables(plan, results),
        "## Latency in closed loops, and errors\n\nMilliseconds, median of the rounds.",
        _closed_loop_table(plan, results),
    ]
    if plan.open_loops:
        parts += [
            f"## Latency at {config.load:.0%} of each contender's own throughput\n\nOpen loop: Poisson arrivals at this share "
            "of the rate that the contender reached in the same round. Milliseconds from the time at which a request was due.",
            _open_loop_table(plan, results),
        ]
    parts += [
        "## Correctness\n\nCosine to sentence-transformers at fp32, each text alone and all in one request, in every round.",
        _agreement_table(results),
        "## Load of the machine\n\nCores kept busy during the measurements, median (highest). A measurement during which "
        f"other processes kept more than {_DISTURBING_CORES:g} cores busy counts as disturbed.",
        _cores_table(plan, results),
        "## All rounds\n\nRequests per second / p50 in ms; * disturbed.",
        markdown_table(
            ["Workload", "contender", *(f"round {number + 1}" for number in range(config.rounds))],
            [
                [workload.name, name, *map(_run_cell, runs)]
                for workload in [*plan.workloads, *plan.open_loops]
                for name in plan.names
                if (runs := results.of(name, workload))
            ],
        ),
    ]
    return "\n\n".join(parts)


def _ratio_tables(plan: Plan, results: Results) -> list[str]:
    ours = next((name for name in plan.names if name in OURS), None)
    others = [name for name in plan.names if name != ours]
    if ours is None or not others:
        return []

    def table(values: Callable[[str, Workload], list[float]]) -> str:
        def against(name: str, workload: Workload) -> list[float]:
            return ratios(values(ours, workload), values(name, workload))

        return _comparison(plan, results, others, against)

    return [
        f"## Requests per second, as ratios\n\n{ours} ÷ contender within each round, median (lowest–highest); higher is better. "
        "`engine` is the engine of this service in process, without HTTP.",
        table(results.rates),
        "## Median latency, as ratios\n\nLower is better.",
        table(results.medians),
    ]


def _comparison(
    plan: Plan, results: Results, names: Sequence[str], values: Callable[[str, Workload], list[float]]
) -> str:
    """Return a table with a row for each contender: a value for each workload, and its lowest cosine."""
    rows = [
        [name, *(format_spread(values(name, workload)) for workload in plan.workloads), _lowest_cosine(results, name)]
        for name in names
    ]
    return markdown_table(["Contender", *(workload.title for workload in plan.workloads), "lowest cosine"], rows)


def _lowest_cosine(results: Results, name: str) -> str:
    agreements = results.agreements.get(name, [])
    return f"{min(agreement.min_cosine for agreement in agreements):.5f}" if agreements else NONE


def _closed_loop_table(plan: Plan, results: Results) -> str:
    rows = []
    for workload in plan.workloads:
        for name in plan.names:
            runs = results.of(name, workload)
            generator = runs[0].result.generator
            rows.append([workload.title, name, *_latency_cells(runs), *_count_cells(runs), generator])
    head = ["Workload", "contender", *_PERCENTILES, "answered", "errors", "repeated", "generator"]
    return markdown_table(head, rows)


def _open_loop_table(plan: Plan, results: Results) -> str:
    rows = []
    for workload in plan.open_loops:
        for contender in plan.contenders:
            runs = results.of(contender.name, workload)
            offered = [run.offered for run in runs if run.offered is not None]
            p99, p50 = ([run.result.latency_ms.get(name, 0.0) for run in runs] for name in ("p99", "p50"))
            rows.append(
                [
                    count_texts(workload.kind, workload.texts),
                    contender.name,
                    format_spread(offered),
                    *_latency_cells(runs),
                    format_spread(ratios(p99, p50)),
                    *_count_cells(runs),
                ]
            )
    head = [
        "Workload", "contender", "offered/s", *_PERCENTILES, "p99 ÷ p50", "answered", "errors", "repeated",
    ]  # fmt: skip
    return markdown_table(head, rows)


def _agreement_table(results: Results) -> str:
    rows = []
    for name, agreements in results.agreements.items():
        mean = min(agreement.mean_cosine for agreement in agreements)
        first = agreements[0]
        rows.append([name, str(first.texts), str(first.dimension), _lowest_cosine(results, name), f"{mean:.5f}"])
    return markdown_table(["Server", "texts", "size", "lowest cosine", "mean cosine"], rows)


def _cores_table(plan: Plan, results: Results) -> str:
    rows = []
    for name in plan.names:
        runs = [run for run in results.runs if run.contender == name]
        columns = [
            [getattr(run.result, cores) for run in runs] for cores in ("server_cores", "generator_cores", "other_cores")
        ]
        disturbed = f"{sum(run.is_disturbed for run in runs)} of {len(runs)}"
        rows.append([name, *(f"{median(values):.2f} ({max(values):.2f})" for values in columns), disturbed])
    return markdown_table(["Contender", "server", "load generator", "other processes", "disturbed"], rows)


def _latency_cells(runs: Sequence[Run]) -> list[str]:
    columns = [[run.result.latency_ms[name] for run in runs if name in run.result.latency_ms] for name in _PERCENTILES]
    return [format_number(median(values)) if values else NONE for values in columns]


def _count_cells(runs: Sequence[Run]) -> list[str]:
    errors: Counter[str] = Counter()
    for run in runs:
        errors.update(run.result.errors)
    answered, repeated = sum(run.result.ok for run in runs), sum(run.result.repeated for run in runs)
    return [str(answered), format_counts(errors), str(repeated)]


def _run_cell(run: Run) -> str:
    p50 = format_number(run.result.latency_ms.get("p50", math.nan))
    return f"{format_number(run.result.rate)} / {p50}{'*' if run.is_disturbed else ''}"


if __name__ == "__main__":
    sys.exit(main())
