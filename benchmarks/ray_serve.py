"""Measures what Ray Serve adds to a request: its proxy in Python, and HAProxy, next to the service without Ray.

Needs the extra `ray`. The model is static, so that the time of a request is that of its way.
"""

from __future__ import annotations

import argparse
import http.client
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks import QUICK_HELP, ROOT
from benchmarks.bulk import write_model
from benchmarks.contenders import clean_environment
from benchmarks.report import describe_run, format_number, format_spread, log_progress, markdown_table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_CONTENDERS = ("service", "Ray, Python proxy", "Ray, HAProxy")
_PORT = 29_300
_START_S = 180.0
_CONNECTIONS = 16
_SERVE = """
import sys, time, ray
from ray import serve
from emb_model_provider.cluster.ray_serve import Options, build

port = int(sys.argv[1])
ray.init(num_cpus=8, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
serve.start(http_options={"port": port, "host": "127.0.0.1"}, grpc_options={"port": port + 1})
serve.run(build(Options()), name="embeddings")
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ray_serve", description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of each load (default: %(default)g)")
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    options = parser.parse_args(arguments)
    rounds, seconds = (1, 1.0) if options.quick else (options.rounds, options.seconds)
    latencies: dict[str, list[float]] = {}
    rates: dict[str, list[float]] = {}
    errors = 0
    with tempfile.TemporaryDirectory(prefix="benchmarks-ray-") as name:
        model = write_model(Path(name) / "model")
        for number in range(rounds):
            for contender in _CONTENDERS:
                log_progress(f"round {number + 1}/{rounds}: {contender}")
                with _started(contender, model, _PORT + 10 * _CONTENDERS.index(contender)) as port:
                    _load(port, 1, seconds / 5)
                    alone, failed_alone = _load(port, 1, seconds)
                    together, failed_together = _load(port, _CONNECTIONS, seconds)
                latencies.setdefault(contender, []).append(1000 * float(np.median(alone)))
                rates.setdefault(contender, []).append(len(together) / seconds)
                errors += failed_alone + failed_together
    print(_report(latencies, rates, errors, f"{rounds} round(s) of {seconds:g} s"))
    return 1 if errors else 0


@contextmanager
def _started(contender: str, model: Path, port: int) -> Iterator[int]:
    """Start a contender, and yield its port once it serves the model."""
    environment = clean_environment() | {
        "EMB_PROVIDER_CACHE_DIR": str(model.with_name("cache")),
        "EMB_PROVIDER_MODEL_MAPPING": f'{{"static": {{"path": "{model}"}}}}',
        "EMB_PROVIDER_PORT": str(port),
        "EMB_PROVIDER_RESULT_CACHE_MB": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
    }
    if contender == "service":
        command = [sys.executable, "-m", "emb_model_provider.main"]
    else:
        command = [sys.executable, "-c", _SERVE, str(port)]
        environment |= {"RAY_SERVE_ENABLE_HA_PROXY": "1"} if "HAProxy" in contender else {}
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
    if errors:
        log_progress(f"{len(errors)} errors, the first: {errors[0][:300]}")
    return taken, len(errors)


def _report(latencies: dict[str, list[float]], rates: dict[str, list[float]], errors: int, rounds: str) -> str:
    notes = [
        f"{rounds}, contenders alternate; one short text per request, static embeddings; one replica",
        f"Latency: median over one connection. Rate: {_CONNECTIONS} connections. The client takes a part of the same processors",
    ]
    direct = latencies[_CONTENDERS[0]]
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
    return "\n\n".join(
        [
            "# Ray Serve",
            describe_run("benchmarks.ray_serve", notes),
            "## Overhead",
            markdown_table(head, rows),
            f"Errors: {errors}.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
