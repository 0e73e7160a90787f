"""Measures the model without a server, and the matrix products of the machine as an upper bound."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks import QUICK_HELP
from benchmarks.contenders import OURS, SERVICE_CACHE, alternate, check_names
from benchmarks.inprocess import GEMM_SHAPES, measure
from benchmarks.report import describe_run, format_number, format_spread, log_progress, markdown_table, ratios
from benchmarks.texts import Corpus, count_texts, count_tokens, describe_texts
from benchmarks.workloads import read_inputs, write_bodies
from emb_model_provider.hubs.local import find_bundled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.texts import Kind

SENTENCE_TRANSFORMERS = {"st-fp32": "float32", "st-bf16": "bfloat16"}
CONTENDERS = (*SENTENCE_TRANSFORMERS, *OURS, "engine")
_GEMM = "gemm"
_DTYPES = ("float32", "bfloat16")
LARGE_SHAPE = "x".join(map(str, GEMM_SHAPES[-1]))
_TEXTS_PER_FILE = 2000


@dataclass(frozen=True, slots=True)
class Batch:
    """The texts of one call."""

    kind: Kind
    texts: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.texts}"

    @property
    def title(self) -> str:
        return count_texts(self.kind, self.texts)


BATCHES = (*(Batch("short", size) for size in (1, 8, 32, 64)), *(Batch("doc", size) for size in (1, 8, 32)))


@dataclass(frozen=True, slots=True)
class Model:
    """The sizes of the bundled model that determine the number of operations."""

    layers: int
    hidden: int
    intermediate: int

    @classmethod
    def bundled(cls) -> Model:
        config = json.loads((find_bundled() / "config.json").read_text(encoding="utf-8"))
        return cls(config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"])

    def flops(self, tokens: int) -> float:
        """Return the operations for one text: linear layers and attention, without padding."""
        linear = 2 * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate)
        return self.layers * (tokens * linear + 4 * tokens**2 * self.hidden)


@dataclass(frozen=True, slots=True)
class Sample:
    """One contender with one batch size in one round."""

    texts_per_s: float
    flops_per_s: float
    p50_ms: float
    other_cores: float


class Results:
    """All measurements of a run."""

    def __init__(self) -> None:
        self.samples: dict[tuple[str, str], list[Sample]] = {}
        """By contender and batch, one per round."""
        self.gemm_rates: list[dict[str, dict[str, float]]] = []
        """Operations per second by shape and dtype, one per round."""
        self.about: dict[str, str] = {}
        """Description of each contender."""

    def add(self, name: str, batch: Batch, sample: Sample) -> None:
        self.samples.setdefault((name, batch.name), []).append(sample)

    def column(self, name: str, batch: Batch, field: str) -> list[float]:
        """Return a field of the samples of all rounds."""
        return [getattr(sample, field) for sample in self.samples[name, batch.name]]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse_options(arguments)
    names = options.contenders.split(",")
    check_names(names, CONTENDERS, "contender")
    batches = BATCHES[::3] if options.quick else BATCHES
    seconds, rounds = (0.2, 1) if options.quick else (options.seconds, options.rounds)
    results = Results()
    with tempfile.TemporaryDirectory(prefix="benchmarks-engine-") as directory:
        corpus = Corpus()
        bodies = {
            batch.name: write_bodies(
                Path(directory) / batch.name, corpus, batch.kind, batch.texts, _TEXTS_PER_FILE // batch.texts, "float"
            )
            for batch in batches
        }
        for number in range(rounds):
            for name in alternate([*names, _GEMM], number):
                log_progress(f"round {number + 1}/{rounds}: {name}")
                result = measure(_job(name, batches, bodies, seconds))
                results.about[name] = result["about"]
                if name == _GEMM:
                    results.gemm_rates.append(result["rates"])
                    continue
                for batch in batches:
                    sample = _sample(result["cases"][batch.name], batch, bodies[batch.name])
                    results.add(name, batch, sample)
                    log_progress(f"  {batch.title}: {sample.texts_per_s:.0f} texts/s")
    duration = f"{rounds} round(s), {seconds:g} s per measurement after a warm-up"
    print(_report(names, batches, results, duration))
    return 0


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--contenders", default="st-fp32,st-bf16,ours,engine",
                        help=f"separated by commas, from {', '.join(CONTENDERS)} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=3.0, help="duration of a measurement (default: %(default)g)")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    return parser.parse_args(arguments)


def _job(name: str, batches: Sequence[Batch], bodies: dict[str, Path], seconds: float) -> dict[str, Any]:
    job: dict[str, Any] = {
        "seconds": seconds,
        "warm_up_s": min(1.0, seconds / 2),
        "cases": [
            {"name": batch.name, "bodies": str(bodies[batch.name]), "connections": 64 if batch.texts == 1 else 4}
            for batch in batches
        ],
    }
    if name == _GEMM:
        return job | {"kind": _GEMM}
    if name in SENTENCE_TRANSFORMERS:
        return job | {"kind": "sentence-transformers", "dtype": SENTENCE_TRANSFORMERS[name]}
    settings = {key.lower(): value for key, value in OURS.get(name, {}).items()}
    kind = "engine" if name == "engine" else "backend"
    return job | {"kind": kind, "settings": {"cache_dir": str(SERVICE_CACHE), **settings}}


def _sample(case: dict[str, Any], batch: Batch, bodies: Path) -> Sample:
    model = Model.bundled()
    inputs = itertools.islice(itertools.cycle(read_inputs(bodies)), case["ok"])
    flops = sum(model.flops(count_tokens(text)) for texts in inputs for text in texts)
    return Sample(
        texts_per_s=case["ok"] * batch.texts / case["elapsed_s"],
        flops_per_s=flops / case["elapsed_s"],
        p50_ms=case["latency_ms"]["p50"],
        other_cores=case["other_cores"],
    )


def _report(names: Sequence[str], batches: Sequence[Batch], results: Results, duration: str) -> str:
    model = Model.bundled()
    notes = [
        *describe_texts("short", "doc"),
        f"{duration}, each contender in a separate process",
        *(f"{name}: {description}" for name, description in results.about.items()),
        "`ours` is the tokenizer and the backend, called from one thread per stream; `engine` adds the scheduler and its "
        "threads, and is called from 64 tasks (single texts) or 4 tasks",
        f"A text of n tokens takes {model.layers} · (2n·(4·{model.hidden}² + 2·{model.hidden}·{model.intermediate}) + "
        f"4n²·{model.hidden}) operations; padding does not count",
    ]
    pairs = [
        (name, other)
        for name in names
        for other in names
        if other != name and (name in OURS or (name == "engine" and other not in OURS))
    ]
    limits = [max(rates[LARGE_SHAPE].values()) for rates in results.gemm_rates]
    other_cores = max(sample.other_cores for samples in results.samples.values() for sample in samples)

    def batch_table(columns: Sequence[str], cells: Callable[[Batch], list[str]]) -> str:
        rows = [[batch.title, *cells(batch)] for batch in batches]
        return markdown_table(["Texts per call", *columns], rows)

    def ratio(batch: Batch, name: str, other: str) -> str:
        rates = [results.column(contender, batch, "texts_per_s") for contender in (name, other)]
        return format_spread(ratios(*rates))

    parts = [
        "# The engine in process",
        describe_run("benchmarks.engine", notes),
        "## Texts per second\n\nMedian of the rounds (lowest–highest).",
        batch_table(names, lambda batch: [format_spread(results.column(name, batch, "texts_per_s")) for name in names]),
        "## Time per call\n\nMilliseconds, median of the rounds.",
        batch_table(
            names, lambda batch: [format_number(median(results.column(name, batch, "p50_ms"))) for name in names]
        ),
    ]
    if pairs:
        parts += [
            "## Texts per second, as ratios\n\nRatios within each round.",
            batch_table(
                [f"{name} ÷ {other}" for name, other in pairs], lambda batch: [ratio(batch, *pair) for pair in pairs]
            ),
        ]
    parts += [
        "## Matrix products of the machine\n\nGFLOP/s.",
        markdown_table(
            ["Shape", *_DTYPES],
            [
                [
                    shape,
                    *(format_spread([rates[shape][dtype] / 1e9 for rates in results.gemm_rates]) for dtype in _DTYPES),
                ]
                for shape in results.gemm_rates[0]
            ],
        ),
        f"## Share of the limit\n\nOperations per second, divided by the rate of the {LARGE_SHAPE} product at its faster "
        "dtype in the same round.",
        batch_table(
            names,
            lambda batch: [format_spread(ratios(results.column(name, batch, "flops_per_s"), limits)) for name in names],
        ),
        f"Other processes kept up to {other_cores:.2f} cores busy during a measurement.",
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
