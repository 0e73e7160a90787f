"""The tables of `benchmarks.serve`."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from benchmarks.contenders import INFINITY, OURS
from benchmarks.machine import machine_lines
from benchmarks.peers import infinity_environment, infinity_versions
from benchmarks.table import NONE, number, ratios, spread, table
from benchmarks.texts import DISTRIBUTIONS
from benchmarks.workloads import OPEN_LOOPS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.load import Result
    from benchmarks.reference import Agreement
    from benchmarks.serve import Plan, Run


_DISTURBING_CORES = 0.1


def report(
    plan: Plan, runs: Sequence[Run], agreements: dict[str, list[Agreement]], infinity: Path | None
) -> str:
    """Return all tables as Markdown."""
    parts = [
        "# Serving",
        "\n".join(machine_lines("benchmarks.serve", _notes(plan, infinity))),
        "## Requests answered per second\n\nMedian of the rounds (lowest–highest).",
        table(
            ["Workload", *plan.names],
            [
                [one.title, *(spread(_rates(runs, name, one.name)) for name in plan.names)]
                for one in plan.workloads
            ],
        ),
        *_ratio_tables(plan, runs),
        "## Latency in closed loops, and errors\n\nMilliseconds, median of the rounds.",
        _latency_table(plan, runs),
        *_open_loop_table(plan, runs),
        "## Vectors\n\nCosine to sentence-transformers at fp32, each text alone and all in one request, in every round.",
        table(
            ["Server", "texts", "size", "lowest cosine", "mean cosine"],
            [_agreement_row(name, found) for name, found in agreements.items()],
        ),
        "## What else the machine did\n\nCores kept busy during the measurements, median (highest). Where others were "
        f"busy, the times are theirs too: with more than {_DISTURBING_CORES:g} a measurement counts as disturbed.",
        _cores_table(plan, runs),
        "## Every round\n\nRequests per second / p50 ms; * disturbed.",
        table(
            ["Workload", "contender", *(f"round {number + 1}" for number in range(plan.rounds))],
            [
                [one, name, *map(_cell, found)]
                for one in [*(workload.name for workload in plan.workloads), *plan.open_loops]
                for name in plan.names
                if (found := _of(runs, name, one))
            ],
        ),
    ]
    return "\n\n".join(parts)


def _notes(plan: Plan, infinity: Path | None) -> list[str]:
    peers = [one.name for one in plan.contenders if one.name in INFINITY]
    notes = [f"{kind}: {distribution}" for kind, distribution in DISTRIBUTIONS.items()]
    notes.append(
        f"{plan.rounds} round(s), {plan.seconds:g} s or more a measurement after a warm-up; a contender gets a text once, "
        f"but for those counted as repeated; encoding_format {plan.encoding}; all contenders get the same bytes"
    )
    if peers:
        notes.append(f"infinity's environment: {infinity_versions(infinity_environment(infinity))}")
    return notes


def _ratio_tables(plan: Plan, runs: Sequence[Run]) -> list[str]:
    """Ours over each other contender; where it is the engine in process, latency too."""
    ours = next((name for name in plan.names if name in OURS), None)
    others = [name for name in plan.names if name != ours]
    if ours is None or not others:
        return []
    rate = [
        [one.title, *(_ratio(_rates(runs, ours, one.name), _rates(runs, name, one.name)) for name in others)]
        for one in plan.workloads
    ]
    latency = [
        [one.title, *(_ratio(_p50(runs, ours, one.name), _p50(runs, name, one.name)) for name in others)]
        for one in plan.workloads
    ]
    head = ["Workload", *(f"{ours} ÷ {name}" for name in others)]
    what = "Ratios are taken within each round; median (lowest–highest). `engine` is ours in process, without HTTP."
    return [
        f"## Requests per second, as ratios\n\n{what} Higher is better.",
        table(head, rate),
        "## Median latency, as ratios\n\nLower is better.",
        table(head, latency),
    ]


def _latency_table(plan: Plan, runs: Sequence[Run]) -> str:
    rows = []
    for one in plan.workloads:
        for name in plan.names:
            found = _of(runs, name, one.name)
            rows.append([one.title, name, *_latencies(found), *_counts(found), found[0].result.generator])
    return table(
        ["Workload", "contender", "p50", "p95", "p99", "answered", "errors", "repeated", "generator"], rows
    )


def _open_loop_table(plan: Plan, runs: Sequence[Run]) -> list[str]:
    if not plan.open_loops:
        return []
    rows = []
    for workload in plan.open_loops:
        what = "1 short text" if OPEN_LOOPS[workload] == "short" else "1 document"
        for one in plan.contenders:
            found = _of(runs, one.name, workload)
            offered = [run.offered for run in found if run.offered is not None]
            tail = ratios(*([run.result.latency_ms.get(p, 0.0) for run in found] for p in ("p99", "p50")))
            rows.append([what, one.name, spread(offered), *_latencies(found), spread(tail), *_counts(found)])
    head = [
        "Workload",
        "contender",
        "offered/s",
        "p50",
        "p95",
        "p99",
        "p99 ÷ p50",
        "answered",
        "errors",
        "repeated",
    ]
    title = (
        f"## Latency at {plan.load_share:.0%} of capacity\n\nOpen loop: Poisson arrivals at that share of the rate that "
        "each contender reached itself in the same round. Milliseconds from the time a request was due."
    )
    return [title, table(head, rows)]


def _cores_table(plan: Plan, runs: Sequence[Run]) -> str:
    rows = []
    for name in plan.names:
        results = [run.result for run in runs if run.contender == name]
        columns = [
            [one.server_cores for one in results],
            [one.generator_cores for one in results],
            [one.other_cores for one in results],
        ]
        disturbed = f"{sum(map(_disturbed, results))} of {len(results)}"
        rows.append([name, *(f"{median(values):.2f} ({max(values):.2f})" for values in columns), disturbed])
    return table(["Contender", "itself", "load generator", "others", "disturbed"], rows)


def _agreement_row(name: str, found: Sequence[Agreement]) -> list[str]:
    lowest = min(one.min_cosine for one in found)
    mean = min(one.mean_cosine for one in found)
    return [name, str(found[0].texts), str(found[0].dimension), f"{lowest:.5f}", f"{mean:.5f}"]


def _of(runs: Sequence[Run], contender: str, workload: str) -> list[Run]:
    return [run for run in runs if (run.contender, run.workload) == (contender, workload)]


def _rates(runs: Sequence[Run], contender: str, workload: str) -> list[float]:
    return [run.result.rate for run in _of(runs, contender, workload)]


def _p50(runs: Sequence[Run], contender: str, workload: str) -> list[float]:
    return [run.result.latency_ms.get("p50", 0.0) for run in _of(runs, contender, workload)]


def _ratio(over: list[float], under: list[float]) -> str:
    return spread(ratios(over, under))


def _disturbed(result: Result) -> bool:
    return result.other_cores > _DISTURBING_CORES


def _cell(run: Run) -> str:
    return f"{number(run.result.rate)} / {_ms(run, 'p50')}{'*' if _disturbed(run.result) else ''}"


def _ms(run: Run, percentile: str) -> str:
    found = run.result.latency_ms.get(percentile)
    return NONE if found is None else number(found)


def _latencies(found: Sequence[Run]) -> list[str]:
    return [
        number(median(values))
        if (values := [run.result.latency_ms[name] for run in found if name in run.result.latency_ms])
        else NONE
        for name in ("p50", "p95", "p99")
    ]


def _counts(found: Sequence[Run]) -> list[str]:
    errors: dict[str, int] = {}
    for run in found:
        for reason, count in run.result.errors.items():
            errors[reason] = errors.get(reason, 0) + count
    shown = ", ".join(f"{count} {reason}" for reason, count in errors.items()) or "0"
    return [str(sum(run.result.ok for run in found)), shown, str(sum(run.result.repeated for run in found))]
