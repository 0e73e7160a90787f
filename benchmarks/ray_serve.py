"""Measures Ray Serve on this machine, with its proxy in Python and with HAProxy. Needs the extra `ray`.

- `overhead`: what a proxy adds to a request, next to the service without Ray. The model is static, so that the time of a
  request is that of its way.
- `throughput`: requests per second of several replicas, whose model sleeps (`benchmarks.ray_cluster`).
- `faults`: what clients notice when a replica, a node or the controller is killed, of a rolling deploy, and of scaling.
"""

from __future__ import annotations

import argparse
import http.client
import json
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import QUICK_HELP, ROOT
from benchmarks.bulk import write_model
from benchmarks.contenders import clean_environment
from benchmarks.report import describe_run, format_number, format_spread, log_progress, markdown_table, ratios

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_CONTENDERS = ("service", "Ray, Python proxy", "Ray, HAProxy")
_PARTS = ("overhead", "throughput", "faults")
_PORT = 29_300
_START_S = 180.0
_HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # Its other ports, which another Ray on this machine may use.
    "RAY_SERVE_HAPROXY_METRICS_PORT": str(_PORT + 60),
    "RAY_SERVE_HAPROXY_STATS_PORT": str(_PORT + 61),
}
_CONNECTIONS = 16
_SERVE = """
import sys, time, ray
from ray import serve
from emb_model_provider.cluster.ray_serve import Options, build

port = int(sys.argv[1])
ray.init(address="local", num_cpus=8, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"port": port, "host": "127.0.0.1"}, grpc_options={"port": port + 1})
serve.run(build(Options()), name="embeddings")
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ray_serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=_PARTS, help="(default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of each load (default: %(default)g)")
    parser.add_argument("--without", nargs="+", choices=_CONTENDERS[1:], default=(), help="proxies to leave out")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    options = parser.parse_args(arguments)
    rounds, seconds = (1, 1.0) if options.quick else (options.rounds, options.seconds)
    contenders = [name for name in _CONTENDERS if name not in options.without]
    results: list[tuple[str, int]] = []
    with tempfile.TemporaryDirectory(prefix="benchmarks-ray-") as name:
        model = write_model(Path(name) / "model")
        if "overhead" in options.parts:
            results.append(_measure_overhead(model, contenders, rounds, seconds))
        if "throughput" in options.parts:
            sizes = [1, 3] if options.quick else [1, 2, 4, 8]
            results.append(_measure_throughput(model, contenders, sizes, rounds, seconds))
        if "faults" in options.parts:
            results.append(_measure_faults(model, contenders))
    notes = [f"{rounds} round(s) of {seconds:g} s. The client takes a part of the same processors"]
    print("\n\n".join(["# Ray Serve", describe_run("benchmarks.ray_serve", notes), *(text for text, _ in results)]))
    return 1 if any(errors for _, errors in results) else 0


def _measure_overhead(model: Path, contenders: Sequence[str], rounds: int, seconds: float) -> tuple[str, int]:
    latencies: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    errors = 0
    for number in range(rounds):
        for contender in contenders:
            log_progress(f"round {number + 1}/{rounds}: {contender}")
            with _started(contender, model, _PORT + 10 * _CONTENDERS.index(contender)) as port:
                _load(port, 1, seconds / 5)
                alone, failed_alone = _load(port, 1, seconds)
                together, failed_together = _load(port, _CONNECTIONS, seconds)
            latencies.setdefault(contender, []).append(1000 * float(np.median(alone)))
            rates.setdefault(contender, []).append(len(together) / seconds)
            errors += failed_alone + failed_together
    return _report_overhead(latencies, rates, errors), errors


def _measure_throughput(
    model: Path, contenders: Sequence[str], sizes: Sequence[int], rounds: int, seconds: float
) -> tuple[str, int]:
    rows, errors = [], 0
    for contender in contenders[1:]:
        result = _run_cluster(contender, model, part="throughput", sizes=sizes, rounds=rounds, seconds=seconds)
        errors += _show_errors(result["errors"])
        first = result["sizes"][0]["rates"]
        for entry in result["sizes"]:
            size = entry["replicas"]
            shares = [rate / size for rate in ratios(entry["rates"], first)]
            rows.append(
                [contender, str(size), str(entry["answered"]), format_spread(entry["rates"]), format_spread(shares)]
            )
    head = ["", "replicas", "of which answered", "requests/s", "of N times one replica"]
    return f"## Throughput\n\n{markdown_table(head, rows)}\n\nErrors: {errors}.", errors


def _measure_faults(model: Path, contenders: Sequence[str]) -> tuple[str, int]:
    rows, errors = [], 0
    for contender in contenders[1:]:
        for entry in _run_cluster(contender, model, part="faults")["events"]:
            errors += _show_errors(entry["errors"])
            counts = [entry["retries"], entry["answers"], len(entry["errors"]), entry["retried"]]
            times = [entry["pause_s"], entry["longest_s"], entry["recovered_s"]]
            rows.append([contender, entry["event"], *map(str, counts), *map(format_number, times)])
    head = [
        "",
        "event",
        "retries",
        "answers",
        "errors",
        "after a retry",
        "longest pause, s",
        "longest request, s",
        "recovered, s",
    ]
    return f"## Faults\n\n{markdown_table(head, rows)}", errors


def _run_cluster(contender: str, model: Path, **arguments: Any) -> dict[str, Any]:
    """Run `benchmarks.ray_cluster` with the proxy of a contender."""
    log_progress(f"{arguments['part']}: {contender}")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.ray_cluster"],
        input=json.dumps(
            {"model": str(model), "cache": str(model.with_name("cache")), "port": _PORT + 50, **arguments}
        ),
        cwd=model.parent,
        env=_environment(contender),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _show_errors(errors: Sequence[str]) -> int:
    if errors:
        log_progress(f"{len(errors)} errors, the first: {errors[0][:300]}")
    return len(errors)


def _environment(contender: str) -> dict[str, str]:
    return (
        clean_environment()
        | {
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_USAGE_STATS_ENABLED": "0",
            # As on Windows and macOS, where Ray uses the loopback address.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "PYTHONPATH": str(ROOT),
        }
        | (_HAPROXY if "HAProxy" in contender else {})
    )


@contextmanager
def _started(contender: str, model: Path, port: int) -> Iterator[int]:
    """Start a contender, and yield its port once it serves the model."""
    environment = _environment(contender) | {
        "EMB_PROVIDER_CACHE_DIR": str(model.with_name("cache")),
        "EMB_PROVIDER_MODEL_MAPPING": f'{{"static": {{"path": "{model}"}}}}',
        "EMB_PROVIDER_PORT": str(port),
        "EMB_PROVIDER_RESULT_CACHE_MB": "0",
    }
    if contender == "service":
        command = [sys.executable, "-m", "emb_model_provider.main"]
    else:
        command = [sys.executable, "-c", _SERVE, str(port)]
    log = model.with_name("log.txt")
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=model.parent, env=environment, stdin=subprocess.PIPE, stdout=output, stderr=output
        )
    try:
        deadline = time.monotonic() + _START_S
        while not _is_ready(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{contender} did not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.2)
        yield port
    finally:
        assert process.stdin is not None  # noqa: S101 - piped
        process.stdin.close()
        if contender == "service":
            process.terminate()
        process.wait(60)


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def _load(port: int, connections: int, seconds: float) -> tuple[list[float], int]:
    """Send short texts over a number of connections; return the seconds of each request, and the number of errors."""
    taken: list[float] = []
    errors: list[str] = []
    end = time.perf_counter() + seconds

    def send() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        headers = {"content-type": "application/json"}
        while (sent := time.perf_counter()) < end:
            connection.request(
                "POST", "/v1/embeddings", b'{"input": "the quick brown fox", "model": "static"}', headers
            )
            response = connection.getresponse()
            body = response.read()
            taken.append(time.perf_counter() - sent)
            if response.status != 200:
                errors.append(body.decode(errors="replace"))
        connection.close()

    threads = [threading.Thread(target=send) for _ in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return taken, _show_errors(errors)


def _report_overhead(latencies: dict[str, list[float]], rates: dict[str, list[float]], errors: int) -> str:
    direct = latencies[next(iter(latencies))]
    rows = [
        [
            name,
            format_spread(latencies[name]),
            format_number(float(np.median(np.subtract(latencies[name], direct)))),
            format_spread(rates[name]),
        ]
        for name in latencies
    ]
    head = ["", "latency, ms", "more than the service, ms", "requests/s"]
    return f"## Overhead\n\n{markdown_table(head, rows)}\n\nErrors: {errors}."


if __name__ == "__main__":
    sys.exit(main())
