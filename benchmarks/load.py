"""Runs a load generator against a server: wrk if it is installed and suitable, otherwise `generator.py`."""

from __future__ import annotations

import json
import math
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.resources import cpu_time

if TYPE_CHECKING:
    from benchmarks.contenders import Server

Generator = Literal["auto", "wrk", "own"]

REQUEST_TIMEOUT_S = 60
_DIRECTORY = Path(__file__).parent
_OPEN_CONNECTIONS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """Result of one run of a load generator."""

    generator: str
    ok: int
    """Responses with status 200."""
    elapsed_s: float
    errors: dict[str, int]
    """Number of failed requests by status or reason."""
    latency_ms: dict[str, float]
    """p50, p95, p99, mean and max. Empty if no request succeeded."""
    repeated: int
    """Requests with a body that had been sent before, because there were not enough bodies."""
    generator_cores: float
    server_cores: float
    other_cores: float
    """Cores kept busy by other processes."""

    @property
    def rate(self) -> float:
        """Responses with status 200 per second."""
        return self.ok / self.elapsed_s if self.elapsed_s else 0.0


def has_wrk() -> bool:
    return shutil.which("wrk") is not None


def closed_loop(
    server: Server,
    bodies: Path,
    *,
    connections: int,
    seconds: float,
    generator: Generator = "own",
    path: str = "/v1/embeddings",
) -> Result:
    """Send requests for `seconds` over `connections`, each of which sends its next request after a response.

    Only `own` can send them to another path than that of embeddings.
    """
    if generator == "wrk":
        command = [
            "wrk", "-t1", f"-c{connections}", f"-d{math.ceil(seconds)}", f"--timeout={REQUEST_TIMEOUT_S}s",
            "-s", str(_DIRECTORY / "wrk.lua"), f"http://127.0.0.1:{server.port}/v1/embeddings",
            "--", str(bodies),
        ]  # fmt: skip
        return _run(server, "wrk", command, None, seconds)
    job = {"mode": "closed", "connections": connections, "seconds": seconds, "bodies": str(bodies), "path": path}
    return _run_generator(server, job)


def open_loop(server: Server, bodies: Path, *, rate: float, seconds: float, seed: int) -> Result:
    """Send `rate` requests per second at random times, independently of the responses."""
    job = {
        "mode": "open", "connections": _OPEN_CONNECTIONS, "seconds": seconds, "bodies": str(bodies),
        "rate": rate, "seed": seed,
    }  # fmt: skip
    return _run_generator(server, job)


def _run_generator(server: Server, job: dict[str, Any]) -> Result:
    job |= {"host": "127.0.0.1", "port": server.port, "timeout_s": REQUEST_TIMEOUT_S}
    command = [sys.executable, "-I", "-S", str(_DIRECTORY / "generator.py")]
    return _run(server, "own", command, json.dumps(job), job["seconds"])


def _run(server: Server, name: str, command: list[str], job: str | None, seconds: float) -> Result:
    cpu_before, started, children_before_s = cpu_time(server.pid), time.perf_counter(), _children_cpu_s()
    process = subprocess.run(
        command,
        input=job, stdin=subprocess.DEVNULL if job is None else None,
        capture_output=True, text=True, check=False,
        timeout=seconds + 2 * REQUEST_TIMEOUT_S,
    )  # fmt: skip
    wall_s = time.perf_counter() - started
    cpu = cpu_time(server.pid).since(cpu_before)
    if process.returncode != 0:
        output = process.stderr or process.stdout
        raise RuntimeError(f"{name} ended with exit code {process.returncode}: {output}")
    result = _parse_wrk(process.stdout) if name == "wrk" else json.loads(process.stdout)
    generator_s = _children_cpu_s() - children_before_s
    # Our generator reports its CPU time without its start, during which the server has nothing to do.
    loop_s = result.pop("cpu_s", generator_s)
    return Result(
        generator=name,
        generator_cores=loop_s / result["elapsed_s"] if result["elapsed_s"] else 0.0,
        server_cores=cpu.tree_s / wall_s,
        other_cores=max(0.0, cpu.machine_s - cpu.tree_s - generator_s) / wall_s,
        **result,
    )


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _parse_wrk(output: str) -> dict[str, Any]:
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    result = json.loads(line.removeprefix("RESULT "))
    ok = result["requests"] - result["status"]
    return {
        "ok": ok,
        "elapsed_s": result["elapsed_s"],
        "errors": {name: result[name] for name in ("status", "socket", "timeout") if result[name]},
        "latency_ms": {name: result[name] for name in ("p50", "p95", "p99", "max", "mean")} if ok else {},
        "repeated": result["repeated"],
    }
