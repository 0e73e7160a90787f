"""The model without a server, and what the machine could do at most. `python -m benchmarks.engine --help`."""

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

from benchmarks.contenders import OURS, SERVICE_CACHE
from benchmarks.inprocess import GEMM_SHAPES, measure
from benchmarks.machine import machine_lines
from benchmarks.progress import say
from benchmarks.table import NONE, number, ratios, spread, table
from benchmarks.texts import DISTRIBUTIONS, Corpus, tokens_in
from benchmarks.workloads import read_inputs, write_bodies
from emb_model_provider.hubs.local import find_bundled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.texts import Kind

SENTENCE_TRANSFORMERS = {"st-fp32": "float32", "st-bf16": "bfloat16"}
CONTENDERS = (*SENTENCE_TRANSFORMERS, *OURS, "engine")
_LARGE = "x".join(map(str, GEMM_SHAPES[-1]))
_GEMM = "gemm"


@dataclass(frozen=True, slots=True)
class Batch:
    """Texts that are given to a contender in one call."""

    kind: Kind
    texts: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.texts}"

    @property
    def title(self) -> str:
        what = "short text" if self.kind == "short" else "document"
        return f"{self.texts} {what}{'s' if self.texts > 1 else ''}"


BATCHES = (*(Batch("short", size) for size in (1, 8, 32, 64)), *(Batch("doc", size) for size in (1, 8, 32)))


@dataclass(frozen=True, slots=True)
class Model:
    """The sizes that say how much arithmetic a text takes."""

    layers: int
    hidden: int
    intermediate: int

    @classmethod
    def bundled(cls) -> Model:
        config = json.loads((find_bundled() / "config.json").read_text(encoding="utf-8"))
        return cls(config["num_hidden_layers"], config["hidden_size"], config["intermediate_size"])

    def flops(self, tokens: int) -> float:
        """Return the operations for a text: its linear layers, and its attention without any padding."""
        linear = 2 * (4 * self.hidden**2 + 2 * self.hidden * self.intermediate)
        return self.layers * (tokens * linear + 4 * tokens**2 * self.hidden)


@dataclass(frozen=True, slots=True)
class Sample:
    """One contender with one batch in one round."""

    texts_per_s: float
    flops_per_s: float
    p50_ms: float
    other_cores: float


Samples = dict[tuple[str, str], list[Sample]]
"""By contender and batch; an item a round."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    names = options.contenders.split(",")
    if unknown := [name for name in names if name not in CONTENDERS]:
        raise SystemExit(f"error: no contender is called {unknown[0]!r}. There are: {', '.join(CONTENDERS)}.")
    batches = BATCHES[::3] if options.quick else BATCHES
    seconds, rounds = (0.2, 1) if options.quick else (options.seconds, options.rounds)
    samples: Samples = {}
    gemm: list[dict[str, dict[str, float]]] = []
    about: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="benchmarks-engine-") as directory:
        corpus = Corpus()
        bodies = {
            batch.name: write_bodies(
                Path(directory) / batch.name,
                corpus,
                batch.kind,
                batch.texts,
                4000 // (2 * batch.texts),
                "float",
            )
            for batch in batches
        }
        everyone = [*names, _GEMM]
        for number_, name in itertools.product(range(rounds), range(len(everyone))):
            one = everyone[(number_ + name) % len(everyone)]
            say(f"round {number_ + 1}/{rounds}: {one}")
            result = measure(_job(one, batches, bodies, seconds))
            about[one] = result["about"]
            if one == _GEMM:
                gemm.append(result["rates"])
                continue
            for batch in batches:
                sample = _sample(result["cases"][batch.name], batch, bodies[batch.name])
                samples.setdefault((one, batch.name), []).append(sample)
                say(f"  {batch.title}: {sample.texts_per_s:.0f} texts/s")
    print(_report(names, batches, samples, gemm, about, rounds, seconds))
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=__doc__)
    parser.add_argument("--contenders", default="st-fp32,st-bf16,ours,engine",
                        help=f"of {', '.join(CONTENDERS)} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="a measurement")
    parser.add_argument("--quick", action="store_true",
                        help="tiny: does everything work? Its times mean nothing")  # fmt: skip
    return parser.parse_args(arguments)


def _job(name: str, batches: Sequence[Batch], bodies: dict[str, Path], seconds: float) -> dict[str, Any]:
    job: dict[str, Any] = {
        "seconds": seconds,
        "warm_up_s": min(1.0, seconds / 2),
        "cases": [
            {
                "name": batch.name,
                "bodies": str(bodies[batch.name]),
                "connections": 64 if batch.texts == 1 else 4,
            }
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


def _sample(seen: dict[str, Any], batch: Batch, bodies: Path) -> Sample:
    model, inputs = Model.bundled(), read_inputs(bodies)
    done = itertools.islice(itertools.cycle(inputs), seen["ok"])
    flops = sum(model.flops(tokens_in(text)) for texts in done for text in texts)
    return Sample(
        texts_per_s=seen["ok"] * batch.texts / seen["elapsed_s"],
        flops_per_s=flops / seen["elapsed_s"],
        p50_ms=seen["latency_ms"]["p50"],
        other_cores=seen["other_cores"],
    )


def _report(
    names: Sequence[str],
    batches: Sequence[Batch],
    samples: Samples,
    gemm: Sequence[dict[str, dict[str, float]]],
    about: dict[str, str],
    rounds: int,
    seconds: float,
) -> str:
    model = Model.bundled()
    notes = [
        *(f"{kind}: {distribution}" for kind, distribution in DISTRIBUTIONS.items()),
        f"{rounds} round(s), {seconds:g} s a measurement after a warm-up, each contender in a process of its own",
        *(f"{name}: {what}" for name, what in about.items()),
        "`ours` is tokenizer and backend, called from as many threads as the backend has lanes; `engine` adds the "
        "batcher and its threads, and is called from 64 tasks (single texts) or 4",
        f"A text of n tokens takes {model.layers} · (2n·(4·{model.hidden}² + 2·{model.hidden}·{model.intermediate}) + "
        f"4n²·{model.hidden}) operations; padding counts for nothing",
    ]
    limits = [max(rates[_LARGE].values()) for rates in gemm]

    def column(name: str, batch: Batch, what: str) -> list[float]:
        return [getattr(sample, what) for sample in samples[name, batch.name]]

    def against(batch: Batch, name: str, other: str) -> str:
        return spread(ratios(column(name, batch, "texts_per_s"), column(other, batch, "texts_per_s")))

    ours = [name for name in names if name in OURS or name == "engine"]
    pairs = [
        (one, other)
        for one in ours
        for other in names
        if other != one and not (one == "engine" and other in OURS)
    ]
    others = max(sample.other_cores for found in samples.values() for sample in found)
    parts = [
        "# The engine in process",
        "\n".join(machine_lines("benchmarks.engine", notes)),
        "## Texts per second\n\nMedian of the rounds (lowest–highest).",
        table(
            ["Texts a call", *names],
            [
                [batch.title, *(spread(column(name, batch, "texts_per_s")) for name in names)]
                for batch in batches
            ],
        ),
        "## Median time of a call, ms",
        table(
            ["Texts a call", *names],
            [
                [batch.title, *(number(median(column(name, batch, "p50_ms"))) for name in names)]
                for batch in batches
            ],
        ),
        "## Texts per second, as ratios\n\nTaken within each round.",
        table(
            ["Texts a call", *(f"{one} ÷ {other}" for one, other in pairs)],
            [[batch.title, *(against(batch, *pair) for pair in pairs)] for batch in batches],
        )
        if pairs
        else NONE,
        "## The machine's matrix products\n\nGFLOP/s.",
        table(
            ["Shape", "float32", "bfloat16"],
            [
                [
                    shape,
                    *(
                        spread([rates[shape][dtype] / 1e9 for rates in gemm])
                        for dtype in ("float32", "bfloat16")
                    ),
                ]
                for shape in gemm[0]
            ],
        ),
        f"## Share of the limit\n\nOperations per second over those of the {_LARGE} product at its faster dtype, in the "
        "same round.",
        table(
            ["Texts a call", *names],
            [
                [batch.title, *(spread(ratios(column(name, batch, "flops_per_s"), limits)) for name in names)]
                for batch in batches
            ],
        ),
        f"Others kept up to {others:.2f} cores busy during a measurement.",
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
