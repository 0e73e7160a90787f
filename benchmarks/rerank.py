"""Measures a reranker of the size of MiniLM: pairs per second against sentence-transformers, and what HTTP adds."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import CACHE, QUICK_HELP
from benchmarks.contenders import SERVICE_CACHE, Server, alternate, check_names, make_contender, stop_servers_on_sigterm
from benchmarks.engine import LARGE_SHAPE, Model
from benchmarks.inprocess import measure
from benchmarks.load import closed_loop
from benchmarks.report import describe_run, format_number, format_spread, log_progress, markdown_table, ratios
from benchmarks.texts import Corpus, count_texts, count_tokens, describe_texts
from benchmarks.workloads import read_pairs, write_rerank_bodies
from emb_model_provider.backends.hardware import native_bf16
from emb_model_provider.hubs.local import find_bundled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.texts import Kind

_REFERENCE = "st-fp32"
_OURS = {"ours-fp32": "fp32", "ours-bf16": "bf16"}
CONTENDERS = (_REFERENCE, *_OURS)
_GEMM = "gemm"
_LAYERS, _HIDDEN, _INTERMEDIATE = 6, 384, 1536
_REQUESTS = 200
"""Different requests of each case, which are sent in turn."""


@dataclass(frozen=True, slots=True)
class Case:
    """The documents of one request."""

    kind: Kind
    documents: int

    @property
    def title(self) -> str:
        return count_texts(self.kind, self.documents)


CASES = (Case("short", 10), Case("short", 100), Case("doc", 10), Case("doc", 100), Case("passage", 32))


class Results:
    """All measurements of a run, one of each round."""

    def __init__(self) -> None:
        self.rates: dict[tuple[str, Case], list[float]] = {}
        """Pairs per second, by contender and case."""
        self.p50_ms: dict[tuple[str, Case], list[float]] = {}
        """Time of a request in process, likewise."""
        self.http_ms: dict[Case, list[float]] = {}
        self.gemm_rates: list[dict[str, float]] = []
        """Operations per second of a large matrix product by dtype."""
        self.flops: dict[Case, float] = {}
        """Operations for a pair, without padding: mean of all requests."""
        self.scores: dict[tuple[str, Case], list[float]] = {}
        """Logits of the first request."""
        self.about: dict[str, str] = {}
        """Description of each contender."""

    def add(self, name: str, case: Case, measured: dict[str, Any]) -> None:
        key = name, case
        self.rates.setdefault(key, []).append(measured["ok"] * case.documents / measured["elapsed_s"])
        self.p50_ms.setdefault(key, []).append(measured["latency_ms"]["p50"])
        self.scores[key] = measured["first"]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse_options(arguments)
    names = options.contenders.split(",")
    check_names(names, CONTENDERS, "contender")
    stop_servers_on_sigterm()
    rounds, seconds = (1, 0.3) if options.quick else (options.rounds, options.seconds)
    cases, requests, layers = (CASES[:2], 4, 1) if options.quick else (CASES, _REQUESTS, _LAYERS)
    served = next((name for name in reversed(names) if name in _OURS), None)
    results, corpus = Results(), Corpus()
    model = save_cross_encoder(CACHE / f"cross-encoder-{layers}", layers)
    with tempfile.TemporaryDirectory(prefix="benchmarks-rerank-") as directory:
        bodies = {
            case: write_rerank_bodies(
                Path(directory) / f"{case.kind}-{case.documents}", corpus, case.kind, case.documents, requests
            )
            for case in cases
        }
        sizes = Model(layers, _HIDDEN, _INTERMEDIATE)
        results.flops = {case: _flops(sizes, path) for case, path in bodies.items()}
        for number in range(rounds):
            for name in alternate([*names, _GEMM, *(["http"] if served else [])], number):
                log_progress(f"round {number + 1}/{rounds}: {name}")
                if name == "http":
                    _measure_http(results, _settings(model, served or ""), bodies, seconds, Path(directory))
                    continue
                if name == _GEMM:
                    rates = measure({"kind": _GEMM, "seconds": min(1.0, seconds)})["rates"]
                    results.gemm_rates.append(rates[LARGE_SHAPE])
                    continue
                result = measure(_job(name, model, bodies, seconds))
                results.about[name] = result["about"]
                for case in cases:
                    results.add(name, case, result["cases"][case.title])
    duration = f"{rounds} round(s), {seconds:g} s per measurement after a warm-up"
    print(_report(results, names, cases, served, f"{layers} layers of {_HIDDEN} values", duration))
    return 0


def save_cross_encoder(directory: Path, layers: int) -> Path:
    """Write a cross-encoder with random weights and the tokenizer of the bundled model, unless it exists."""
    if (directory / "config.json").exists():
        return directory
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(7)
    vocabulary = len((find_bundled() / "vocab.txt").read_text(encoding="utf-8").splitlines())
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=_HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=12,
        intermediate_size=_INTERMEDIATE,
        num_labels=1,
    )
    with tempfile.TemporaryDirectory(dir=_created(directory.parent)) as temporary:
        BertForSequenceClassification(config).save_pretrained(temporary)
        for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            shutil.copy(find_bundled() / name, temporary)
        shutil.copytree(temporary, directory, dirs_exist_ok=True)
    return directory


def _created(directory: Path) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def _settings(model: Path, name: str) -> dict[str, Any]:
    entry = {"name": "test/cross-encoder", "path": str(model), "precision": _OURS[name], "device": "cpu"}
    # Random weights lose more at bf16 than trained ones, so that bf16 would be computed in fp32.
    return {"model_mapping": {"reranker": entry}, "agreement_floors": {"bf16": 0}, "preload_models": "reranker"}


def _job(name: str, model: Path, bodies: dict[Case, Path], seconds: float) -> dict[str, Any]:
    job: dict[str, Any] = {
        "seconds": seconds,
        "warm_up_s": min(1.0, seconds / 2),
        "cases": [{"name": case.title, "bodies": str(path), "connections": 1} for case, path in bodies.items()],
    }
    if name == _REFERENCE:
        return job | {"kind": "cross-encoder", "model": str(model)}
    return job | {"kind": "rerank-engine", "settings": {"cache_dir": str(SERVICE_CACHE), **_settings(model, name)}}


def _flops(model: Model, bodies: Path) -> float:
    """Return the operations for a pair, without padding: mean of all pairs of a file."""
    pairs = [pair for request in read_pairs(bodies) for pair in request]
    # A pair has three special tokens, and each of its texts was counted with two.
    return sum(model.flops(count_tokens(query) + count_tokens(document) - 1) for query, document in pairs) / len(pairs)


def _measure_http(
    results: Results, settings: dict[str, Any], bodies: dict[Case, Path], seconds: float, scratch: Path
) -> None:
    ours = make_contender("ours")
    variables = {
        f"EMB_PROVIDER_{name.upper()}": value if isinstance(value, str) else json.dumps(value)
        for name, value in settings.items()
    }
    contender = replace(ours, environment={**ours.environment, **variables})
    with Server(contender, scratch) as server:
        server.wait()
        for case, path in bodies.items():
            closed_loop(server, path, connections=1, seconds=min(1.0, seconds / 2), path="/v1/rerank")
            result = closed_loop(server, path, connections=1, seconds=seconds, path="/v1/rerank")
            if result.errors or not result.ok:
                raise RuntimeError(f"Requests to rerank {case.title} failed: {result.errors}")
            results.http_ms.setdefault(case, []).append(result.latency_ms["p50"])


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    contenders = [name for name in CONTENDERS if native_bf16() or name != "ours-bf16"]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rerank", description=__doc__)
    parser.add_argument("--contenders", default=",".join(contenders),
                        help=f"separated by commas, from {', '.join(CONTENDERS)} (default: %(default)s)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="duration of a measurement (default: %(default)g)")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    return parser.parse_args(arguments)


def _report(
    results: Results, names: Sequence[str], cases: Sequence[Case], served: str | None, size: str, duration: str
) -> str:
    notes = [
        f"A BERT cross-encoder with random weights: {size}, as all-MiniLM-L6-v2 has 6 of them",
        *describe_texts(*(case.kind for case in cases)),
        "A request has one short query; all of its documents are different",
        f"{duration}, each contender in a separate process, one request at a time",
        *(f"{name}: {description}" for name, description in results.about.items()),
    ]
    ours = [name for name in names if name in _OURS]
    parts = [
        "# Reranking",
        describe_run("benchmarks.rerank", notes),
        "## Pairs per second\n\nMedian of the rounds (lowest–highest).",
        markdown_table(
            ["documents of a request", *names],
            [[case.title, *(format_spread(results.rates[name, case]) for name in names)] for case in cases],
        ),
    ]
    if _REFERENCE in names and ours:
        parts += [
            "## Ratios\n\nPairs per second, divided by those of sentence-transformers in the same round; and the largest "
            "difference of a logit in the first request.",
            markdown_table(
                ["documents of a request", *(f"{name}{what}" for name in ours for what in ("", ", logits"))],
                [[case.title, *_compared(results, ours, case)] for case in cases],
            ),
        ]
    parts += [
        f"## Share of the limit\n\nOperations per second, divided by the rate of a {LARGE_SHAPE} matrix product of torch at the "
        "same precision in the same round. "
        + "; ".join(
            f"{dtype}: {format_spread([rates[dtype] / 1e9 for rates in results.gemm_rates])} GFLOP/s"
            for dtype in dict.fromkeys(map(_dtype, names))
        )
        + ".",
        markdown_table(
            ["documents of a request", *names],
            [[case.title, *(_share_of_limit(results, name, case) for name in names)] for case in cases],
        ),
    ]
    if served is not None:
        rows = []
        for case in cases:
            http, engine = results.http_ms[case], results.p50_ms[served, case]
            added = [a - b for a, b in zip(http, engine, strict=True)]
            rows.append(
                [
                    case.title,
                    format_spread(http),
                    format_spread(engine),
                    format_number(median(added)),
                    format_spread(ratios(http, engine)),
                ]
            )
        head = ["documents of a request", "HTTP, ms", "engine, ms", "added, ms", "HTTP ÷ engine"]
        parts += [
            f"## What HTTP adds\n\np50 of `POST /v1/rerank` of {served} on one connection, and of the engine in process for "
            "the same pairs.",
            markdown_table(head, rows),
        ]
    return "\n\n".join(parts)


def _dtype(name: str) -> str:
    return "bfloat16" if _OURS.get(name) == "bf16" else "float32"


def _share_of_limit(results: Results, name: str, case: Case) -> str:
    limits = [rates[_dtype(name)] for rates in results.gemm_rates]
    return format_spread(ratios([rate * results.flops[case] for rate in results.rates[name, case]], limits))


def _compared(results: Results, ours: Sequence[str], case: Case) -> list[str]:
    cells = []
    for name in ours:
        scores, expected = (np.array(results.scores[each, case]) for each in (name, _REFERENCE))
        cells.append(format_spread(ratios(results.rates[name, case], results.rates[_REFERENCE, case])))
        cells.append(f"{np.abs(scores - expected).max():.1e}")
    return cells


if __name__ == "__main__":
    sys.exit(main())
