"""Measures batches of the Batch API: their rate, and the latency of single requests beside them."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from benchmarks import QUICK_HELP
from benchmarks.contenders import Server, make_contender, stop_servers_on_sigterm
from benchmarks.inprocess import measure
from benchmarks.load import closed_loop, open_loop
from benchmarks.report import NONE, describe_run, format_counts, format_spread, log_progress, markdown_table
from benchmarks.texts import Corpus, count_texts
from benchmarks.workloads import request_body, write_bodies

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.load import Result
    from benchmarks.texts import Kind

_BATCHES: tuple[tuple[Kind, int], ...] = (("short", 1), ("short", 32), ("doc", 1), ("doc", 32))
"""Kind and number of the texts of a line."""
_ENGINE_CONNECTIONS, _ENGINE_TEXTS = 8, 64
"""Requests at a time of the engine in process, and texts of each. It computes as many texts at a time as two chunks have."""
_RATE = 20.0
"""Single requests per second."""
_LEAD_S = 1.0


@dataclass(frozen=True, slots=True)
class Config:
    rounds: int
    seconds: float
    """Duration of a measurement of single requests, and of the engine."""
    texts: dict[Kind, int]
    """Texts of a batch."""


@dataclass(frozen=True, slots=True)
class Run:
    """A batch that was computed."""

    running_s: float
    """From the first chunk to the last one."""
    total_s: float
    """From the upload to the last byte of the output."""
    texts: int


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batches", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of a measurement (default: %(default)g)")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    options = parser.parse_args(arguments)
    stop_servers_on_sigterm()
    config = Config(options.rounds, options.seconds, {"short": 32_000, "doc": 4_096})
    if options.quick:
        config = Config(1, 1.0, {"short": 320, "doc": 64})
    rates: dict[tuple[Kind, int], list[float]] = {batch: [] for batch in _BATCHES}
    totals: dict[tuple[Kind, int], list[float]] = {batch: [] for batch in _BATCHES}
    engine: dict[Kind, list[float]] = {"short": [], "doc": []}
    alone: list[Result] = []
    beside: dict[Kind, list[Result]] = {"short": [], "doc": []}
    forwards: dict[Kind, list[float]] = {"short": [], "doc": []}
    with tempfile.TemporaryDirectory(prefix="benchmarks-batches-") as directory:
        scratch, corpus = Path(directory), Corpus()
        single = write_bodies(scratch / "singles", corpus, "short", 1, int(_RATE * config.seconds * 2) + 100, "base64")
        for number in range(config.rounds):
            for kind in engine:
                log_progress(f"round {number + 1}/{config.rounds}: {kind}")
                engine[kind].append(_engine_rate(scratch, corpus, kind, config))
                with Server(make_contender("ours"), scratch / "server") as server:
                    server.wait()
                    closed_loop(server, single, connections=4, seconds=min(2.0, config.seconds))
                    for batch in (batch for batch in _BATCHES if batch[0] == kind):
                        before = _batch_times(server)
                        run = _run_batch(server, _write_lines(scratch, corpus, *batch, config.texts[kind]))
                        after = _batch_times(server)
                        rates[batch].append(run.texts / run.running_s)
                        totals[batch].append(run.texts / run.total_s)
                        forwards[kind].append((after[0] - before[0]) / (after[1] - before[1]))
                    alone.append(open_loop(server, single, rate=_RATE, seconds=config.seconds, seed=number))
                    beside[kind].append(_beside_batch(server, scratch, corpus, kind, single, config, seed=number))
    print(_report(config, rates, totals, engine, alone, beside, forwards))
    results = [*alone, *beside["short"], *beside["doc"]]
    return 1 if any(result.errors or not result.ok for result in results) else 0


def _engine_rate(scratch: Path, corpus: Corpus, kind: Kind, config: Config) -> float:
    bodies = write_bodies(
        scratch / f"engine-{kind}", corpus, kind, _ENGINE_TEXTS, max(8, config.texts[kind] // _ENGINE_TEXTS), "base64"
    )
    contender = make_contender("ours")
    prefix = "EMB_PROVIDER_"
    case = {"name": kind, "bodies": str(bodies), "connections": _ENGINE_CONNECTIONS}
    job = {
        "kind": "engine",
        "settings": {"cache_dir": contender.environment[f"{prefix}CACHE_DIR"], "result_cache_mb": 0},
        "cases": [case],
        "seconds": config.seconds,
        "warm_up_s": min(2.0, config.seconds),
    }
    result = measure(job)["cases"][kind]
    rate: float = result["ok"] * _ENGINE_TEXTS / result["elapsed_s"]
    return rate


def _write_lines(scratch: Path, corpus: Corpus, kind: Kind, texts: int, count: int) -> Path:
    path = scratch / f"batch-{kind}-{texts}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for line in range(count // texts):
            body = json.loads(request_body(corpus.texts(kind, texts), "base64"))
            request = {"custom_id": str(line), "method": "POST", "url": "/v1/embeddings", "body": body}
            file.write(json.dumps(request) + "\n")
    return path


def _run_batch(server: Server, path: Path) -> Run:
    started = time.perf_counter()
    with _client(server) as client:
        batch = _create(client, path)
        running_at = None
        while True:
            batch = client.get(f"/v1/batches/{batch['id']}").raise_for_status().json()
            now = time.perf_counter()
            if batch["status"] != "validating" and running_at is None:
                running_at = now
            counts = batch["request_counts"]
            if counts["total"] and counts["completed"] == counts["total"]:
                break
            if batch["status"] in ("failed", "expired", "cancelled") or counts["failed"]:
                raise RuntimeError(f"The batch failed: {batch}")
            time.sleep(0.02)
        while batch["status"] != "completed":
            time.sleep(0.02)
            batch = client.get(f"/v1/batches/{batch['id']}").raise_for_status().json()
        content = client.get(f"/v1/files/{batch['output_file_id']}/content").raise_for_status().content
    if (lines := len(content.splitlines())) != counts["total"]:
        raise RuntimeError(f"The output has {lines} of {counts['total']} lines.")
    return Run(now - (running_at or started), time.perf_counter() - started, _count_texts(path))


def _count_texts(path: Path) -> int:
    with path.open(encoding="utf-8") as file:
        inputs = [json.loads(line)["body"]["input"] for line in file]
    return sum(1 if isinstance(each, str) else len(each) for each in inputs)


def _client(server: Server) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=600, trust_env=False)


def _create(client: httpx.Client, path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        uploaded = client.post("/v1/files", data={"purpose": "batch"}, files={"file": file}).raise_for_status().json()
    body = {"input_file_id": uploaded["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
    created: dict[str, Any] = client.post("/v1/batches", json=body).raise_for_status().json()
    return created


def _beside_batch(
    server: Server, scratch: Path, corpus: Corpus, kind: Kind, single: Path, config: Config, *, seed: int
) -> Result:
    """Measure single requests while a batch runs, which is cancelled afterwards."""
    path = _write_lines(scratch, corpus, kind, 1, min(49_000, math.ceil(4 * config.texts[kind] * config.seconds / 10)))
    with _client(server) as client, ThreadPoolExecutor(1) as pool:
        batch = _create(client, path)
        while client.get(f"/v1/batches/{batch['id']}").json()["status"] == "validating":
            time.sleep(0.05)
        time.sleep(min(_LEAD_S, config.seconds))
        result = pool.submit(open_loop, server, single, rate=_RATE, seconds=config.seconds, seed=seed).result()
        status = client.get(f"/v1/batches/{batch['id']}").json()["status"]
        if status != "in_progress" and config.seconds > 1:
            raise RuntimeError(f"The batch ended before the single requests: {status}")
        client.post(f"/v1/batches/{batch['id']}/cancel")
        while client.get(f"/v1/batches/{batch['id']}").json()["status"] not in ("cancelled", "completed"):
            time.sleep(0.05)
    return result


def _batch_times(server: Server) -> tuple[float, float]:
    """Return the total time of all batches of inputs so far in seconds, and their number."""
    metrics = server.get("/metrics")

    def values(name: str) -> Iterator[float]:
        for match in re.finditer(rf"^{name}\{{.*\}} (\S+)$", metrics, re.MULTILINE):
            yield float(match.group(1))

    return sum(values("emb_provider_inference_seconds_sum")), sum(values("emb_provider_inference_seconds_count"))


def _report(
    config: Config,
    rates: dict[tuple[Kind, int], list[float]],
    totals: dict[tuple[Kind, int], list[float]],
    engine: dict[Kind, list[float]],
    alone: Sequence[Result],
    beside: dict[Kind, list[Result]],
    forwards: dict[Kind, list[float]],
) -> str:
    notes = [
        f"{config.rounds} round(s). A batch has {config.texts['short']:,} short texts or {config.texts['doc']:,} documents; its "
        "rate is that from its validation to its last line; with upload, validation and download in the second column",
        f"The engine is called in process by {_ENGINE_CONNECTIONS} tasks with {_ENGINE_TEXTS} texts each",
        f"Single requests: one short text, {_RATE:g} per second at random times, {config.seconds:g} s",
    ]
    rate_rows = []
    for (kind, texts), of_batch in rates.items():
        shares = [rate / of_engine for rate, of_engine in zip(of_batch, engine[kind], strict=True)]
        rate_rows.append(
            [
                count_texts(kind, texts),
                format_spread(of_batch),
                format_spread(totals[kind, texts]),
                format_spread(engine[kind]),
                format_spread(shares),
            ]
        )
    rows = [["no batch", *_cells(alone), NONE, NONE]]
    p99_alone = [result.latency_ms.get("p99", math.nan) for result in alone]
    median_alone = sorted(p99_alone)[len(p99_alone) // 2]
    for kind, results in beside.items():
        forward_ms = [1000 * each for each in forwards[kind]]
        forward = sorted(forward_ms)[len(forward_ms) // 2]
        added = [(result.latency_ms.get("p99", math.nan) - median_alone) / forward for result in results]
        rows.append([f"batch of {count_texts(kind, 2)[2:]}", *_cells(results), f"{forward:.1f}", format_spread(added)])
    return "\n\n".join(
        [
            "# Batch API",
            describe_run("benchmarks.batches", notes),
            "## Texts per second\n\nMedian of the rounds (lowest–highest).",
            markdown_table(["texts of a line", "batch", "with upload and download", "engine", "batch ÷ engine"], rate_rows),
            "## Latency of single requests",
            markdown_table(
                ["beside", "p50, ms", "p95, ms", "p99, ms", "errors", "a batch of inputs, ms", "more at p99, in batches"],
                rows,
            ),
        ]
    )  # fmt: skip


def _cells(results: Sequence[Result]) -> list[str]:
    percentiles = ("p50", "p95", "p99")
    errors: dict[str, int] = {}
    for result in results:
        for name, count in result.errors.items():
            errors[name] = errors.get(name, 0) + count
    return [
        *(format_spread([result.latency_ms.get(name, math.nan) for result in results]) for name in percentiles),
        format_counts(errors),
    ]


if __name__ == "__main__":
    sys.exit(main())
