"""Measures batches of the Batch API: their rate, and the latency of single requests beside them.

Rates of a batch and of the engine are measured alternately, and compared within each round. On a machine that is busy with
something else, compare their CPU times instead.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import httpx

from benchmarks import QUICK_HELP
from benchmarks.contenders import Server, make_contender, stop_servers_on_sigterm
from benchmarks.inprocess import measure
from benchmarks.load import closed_loop, open_loop
from benchmarks.report import NONE, describe_run, format_counts, format_spread, log_progress, markdown_table, ratios
from benchmarks.resources import cpu_time
from benchmarks.texts import Corpus, count_texts
from benchmarks.workloads import request_body, write_bodies

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.load import Result
    from benchmarks.texts import Kind

_BATCHES: tuple[tuple[Kind, int], ...] = (("short", 1), ("short", 32), ("doc", 1))
"""Kind and number of the texts of a line."""
_ENGINE_CONNECTIONS, _ENGINE_TEXTS = 8, 64
"""Requests at a time of the engine in process, and texts of each. It computes as many texts at a time as two chunks have."""
_RATE = 20.0
"""Single requests per second."""
_LEAD_S = 1.0
_POLL_S, _POLL_AT_END_S = 0.5, 0.02
"""How often the state of a batch is read. More often only at its end, because each time takes the service 2 to 3 ms of CPU time."""


@dataclass(frozen=True, slots=True)
class Config:
    rounds: int
    seconds: float
    """Duration of a measurement of single requests, and of the engine."""
    texts: dict[Kind, int]
    """Texts of a batch whose rate is measured."""
    beside: dict[Kind, int]
    """Texts of a batch beside which single requests are measured. It is cancelled then."""


@dataclass(frozen=True, slots=True)
class Run:
    """Texts that were computed by a batch or by the engine."""

    rate: float
    """Texts per second."""
    cpu_ms: float
    """CPU time of a text, in milliseconds."""
    other_cores: float
    """Cores that other processes used."""
    forward_s: float = 0.0
    """Mean duration of a batch of inputs."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batches", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=6.0, help="duration of a measurement (default: %(default)g)")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    options = parser.parse_args(arguments)
    stop_servers_on_sigterm()
    config = Config(options.rounds, options.seconds, {"short": 6_144, "doc": 1_024}, {"short": 24_000, "doc": 4_000})
    if options.quick:
        config = Config(1, 1.0, {"short": 320, "doc": 64}, {"short": 4_000, "doc": 600})
    batches: dict[tuple[Kind, int], list[Run]] = {batch: [] for batch in _BATCHES}
    engine: dict[Kind, list[Run]] = {"short": [], "doc": []}
    alone: list[Result] = []
    beside: dict[Kind, list[Result]] = {"short": [], "doc": []}
    with tempfile.TemporaryDirectory(prefix="benchmarks-batches-") as directory:
        scratch, corpus = Path(directory), Corpus()
        log_progress("texts")
        single = write_bodies(scratch / "singles", corpus, "short", 1, int(_RATE * config.seconds * 2) + 100, "base64")
        large = {
            kind: _write_lines(scratch / f"beside-{kind}", corpus, kind, 1, config.beside[kind]) for kind in beside
        }
        with Server(make_contender("ours"), scratch / "server") as server:
            server.wait()
            closed_loop(server, single, connections=4, seconds=min(2.0, config.seconds))
            for number in range(config.rounds):
                log_progress(f"round {number + 1}/{config.rounds}")
                for kind in engine:
                    engine[kind].append(_run_engine(scratch, corpus, kind, config))
                    for batch in (batch for batch in _BATCHES if batch[0] == kind):
                        lines = _write_lines(scratch / "lines", corpus, *batch, config.texts[kind])
                        batches[batch].append(_run_batch(server, lines, config.texts[kind]))
                alone.append(open_loop(server, single, rate=_RATE, seconds=config.seconds, seed=number))
                for kind, path in large.items():
                    beside[kind].append(_beside_batch(server, path, single, config, seed=number))
    print(_report(config, batches, engine, alone, beside))
    results = [*alone, *beside["short"], *beside["doc"]]
    return 1 if any(result.errors or not result.ok for result in results) else 0


def _run_engine(scratch: Path, corpus: Corpus, kind: Kind, config: Config) -> Run:
    bodies = write_bodies(
        scratch / f"engine-{kind}", corpus, kind, _ENGINE_TEXTS, max(8, config.texts[kind] // _ENGINE_TEXTS), "base64"
    )
    contender = make_contender("ours")
    job = {
        "kind": "engine",
        "settings": {"cache_dir": contender.environment["EMB_PROVIDER_CACHE_DIR"], "result_cache_mb": 0},
        "cases": [{"name": kind, "bodies": str(bodies), "connections": _ENGINE_CONNECTIONS}],
        "seconds": config.seconds,
        "warm_up_s": min(1.0, config.seconds),
    }
    result = measure(job)["cases"][kind]
    rate = result["ok"] * _ENGINE_TEXTS / result["elapsed_s"]
    return Run(rate, 1000 * result["server_cores"] / rate, result["other_cores"])


def _write_lines(path: Path, corpus: Corpus, kind: Kind, texts: int, count: int) -> Path:
    drawn = corpus.texts(kind, count)
    with path.open("w", encoding="utf-8") as file:
        for start in range(0, count, texts):
            body = json.loads(request_body(drawn[start : start + texts], "base64"))
            request = {"custom_id": str(start), "method": "POST", "url": "/v1/embeddings", "body": body}
            file.write(json.dumps(request) + "\n")
    return path


def _run_batch(server: Server, path: Path, texts: int) -> Run:
    """Measure a batch from the end of its validation to its last line."""
    with _client(server) as client:
        batch = _create(client, path)
        while batch["status"] == "validating":
            time.sleep(_POLL_AT_END_S)
            batch = client.get(f"/v1/batches/{batch['id']}").raise_for_status().json()
        started, cpu_before, times_before = time.perf_counter(), cpu_time(server.pid), _batch_times(server)
        counts = batch["request_counts"]
        while counts["completed"] < counts["total"]:
            elapsed_s = time.perf_counter() - started
            left_s = elapsed_s * (counts["total"] / counts["completed"] - 1) if counts["completed"] else _POLL_S
            time.sleep(min(_POLL_S, max(_POLL_AT_END_S, left_s / 2)))
            batch = client.get(f"/v1/batches/{batch['id']}").raise_for_status().json()
            counts = batch["request_counts"]
            if batch["status"] in ("failed", "expired", "cancelled") or counts["failed"]:
                raise RuntimeError(f"The batch failed: {batch}")
        elapsed_s, cpu, times = time.perf_counter() - started, cpu_time(server.pid), _batch_times(server)
        while batch["status"] != "completed":
            time.sleep(_POLL_AT_END_S)
            batch = client.get(f"/v1/batches/{batch['id']}").raise_for_status().json()
        content = client.get(f"/v1/files/{batch['output_file_id']}/content").raise_for_status().content
    if (lines := len(content.splitlines())) != counts["total"]:
        raise RuntimeError(f"The output has {lines} of {counts['total']} lines.")
    used = cpu.since(cpu_before)
    forward_s = (times[0] - times_before[0]) / (times[1] - times_before[1])
    return Run(
        texts / elapsed_s, 1000 * used.tree_s / texts, max(0.0, used.machine_s - used.tree_s) / elapsed_s, forward_s
    )


def _client(server: Server) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=600, trust_env=False)


def _create(client: httpx.Client, path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        uploaded = client.post("/v1/files", data={"purpose": "batch"}, files={"file": file}).raise_for_status().json()
    body = {"input_file_id": uploaded["id"], "endpoint": "/v1/embeddings", "completion_window": "24h"}
    created: dict[str, Any] = client.post("/v1/batches", json=body).raise_for_status().json()
    return created


def _beside_batch(server: Server, path: Path, single: Path, config: Config, *, seed: int) -> Result:
    """Measure single requests while a batch runs, which is cancelled afterwards."""
    with _client(server) as client:
        batch = _create(client, path)
        while client.get(f"/v1/batches/{batch['id']}").json()["status"] == "validating":
            time.sleep(_POLL_S)
        time.sleep(min(_LEAD_S, config.seconds))
        result = open_loop(server, single, rate=_RATE, seconds=config.seconds, seed=seed)
        status = client.get(f"/v1/batches/{batch['id']}").json()["status"]
        if status != "in_progress" and config.seconds > 1:
            raise RuntimeError(f"The batch ended before the single requests: {status}")
        client.post(f"/v1/batches/{batch['id']}/cancel")
        while client.get(f"/v1/batches/{batch['id']}").json()["status"] not in ("cancelled", "completed"):
            time.sleep(_POLL_AT_END_S)
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
    batches: dict[tuple[Kind, int], list[Run]],
    engine: dict[Kind, list[Run]],
    alone: Sequence[Result],
    beside: dict[Kind, list[Result]],
) -> str:
    notes = [
        f"{config.rounds} round(s). A batch has {config.texts['short']:,} short texts or {config.texts['doc']:,} documents; its "
        "rate is that from its validation to its last line",
        f"The engine is called in process by {_ENGINE_CONNECTIONS} tasks with {_ENGINE_TEXTS} texts each, for {config.seconds:g} s",
        f"Single requests: one short text, {_RATE:g} per second at random times, {config.seconds:g} s",
    ]
    rate_rows = []
    for (kind, texts), runs in batches.items():
        of_engine = engine[kind]
        rate_rows.append(
            [
                count_texts(kind, texts),
                format_spread([run.rate for run in runs]),
                format_spread([run.rate for run in of_engine]),
                format_spread(ratios([run.rate for run in runs], [run.rate for run in of_engine])),
                format_spread([run.cpu_ms for run in runs]),
                format_spread([run.cpu_ms for run in of_engine]),
                format_spread(ratios([run.cpu_ms for run in of_engine], [run.cpu_ms for run in runs])),
                format_spread([run.other_cores for run in [*runs, *of_engine]]),
            ]
        )
    rows = [["no batch", *_cells(alone), NONE, NONE]]
    median_alone = median(result.latency_ms.get("p99", math.nan) for result in alone)
    for kind, results in beside.items():
        forward_ms = median(1000 * run.forward_s for run in batches[kind, 1])
        added = [(result.latency_ms.get("p99", math.nan) - median_alone) / forward_ms for result in results]
        rows.append(
            [f"batch of {count_texts(kind, 2)[2:]}", *_cells(results), f"{forward_ms:.1f}", format_spread(added)]
        )
    return "\n\n".join(
        [
            "# Batch API",
            describe_run("benchmarks.batches", notes),
            "## Texts per second\n\nMedian of the rounds (lowest–highest). CPU times are of one text, in milliseconds. Other cores "
            "are those that other processes used.",
            markdown_table(
                ["texts of a line", "batch", "engine", "batch ÷ engine", "CPU, batch", "CPU, engine", "engine ÷ batch", "other cores"],
                rate_rows,
            ),
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
