"""Driving a load generator: wrk where it is installed and fits, else our own."""

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

from benchmarks.resources import usage

if TYPE_CHECKING:
    from benchmarks.contenders import Server

Generator = Literal["auto", "wrk", "own"]

REQUEST_TIMEOUT_S = 60
_HERE = Path(__file__).parent
_OPEN_CONNECTIONS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What one run of a generator saw."""

    generator: str
    ok: int
    elapsed_s: float
    errors: dict[str, int]
    """How many, by status or reason."""
    latency_ms: dict[str, float]
    """p50, p95, p99, mean, max; empty where nothing was answered."""
    repeated: int
    """Requests whose body had been sent before, because the prepared ones ran out."""
    generator_cores: float
    server_cores: float
    other_cores: float
    """Cores kept busy by processes that have no part in the measurement."""

    @property
    def rate(self) -> float:
        """Requests answered with 200, a second."""
        return self.ok / self.elapsed_s if self.elapsed_s else 0.0


def has_wrk() -> bool:
    return shutil.which("wrk") is not None


def closed_loop(
    server: Server, bodies: Path, *, connections: int, seconds: float, generator: Generator = "own"
) -> Result:
    """Send over `connections`, each as soon as it is answered, for `seconds`."""
    if generator == "wrk":
        command = [
            "wrk", "-t1", f"-c{connections}", f"-d{math.ceil(seconds)}", f"--timeout={REQUEST_TIMEOUT_S}s",
            "-s", str(_HERE / "wrk.lua"), f"http://127.0.0.1:{server.port}/v1/embeddings", "--", str(bodies),
        ]  # fmt: skip
        return _run(server, "wrk", command, None, seconds)
    job = {"mode": "closed", "connections": connections, "seconds": seconds, "bodies": str(bodies)}
    return _own(server, job)


def open_loop(server: Server, bodies: Path, *, rate: float, seconds: float, seed: int) -> Result:
    """Send `rate` requests a second at random times, whatever the server does."""
    job = {
        "mode": "open", "connections": _OPEN_CONNECTIONS, "seconds": seconds, "bodies": str(bodies),
        "rate": rate, "seed": seed,
    }  # fmt: skip
    return _own(server, job)


def _own(server: Server, job: dict[str, Any]) -> Result:
    job |= {"host": "127.0.0.1", "port": server.port, "timeout_s": REQUEST_TIMEOUT_S}
    command = [sys.executable, "-I", "-S", str(_HERE / "generator.py")]
    return _run(server, "own", command, json.dumps(job), job["seconds"])


def _run(server: Server, name: str, command: list[str], given: str | None, seconds: float) -> Result:
    before, started, children_s = usage(server.pid), time.perf_counter(), _children_cpu_s()
    done = subprocess.run(
        command,
        input=given, stdin=subprocess.DEVNULL if given is None else None,
        capture_output=True, text=True, check=False,
        timeout=seconds + 2 * REQUEST_TIMEOUT_S,
    )  # fmt: skip
    wall = time.perf_counter() - started
    used = usage(server.pid).since(before)
    if done.returncode != 0:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr or done.stdout}")
    seen = _read_wrk(done.stdout) if name == "wrk" else json.loads(done.stdout)
    cpu_s = _children_cpu_s() - children_s
    return Result(
        generator=name,
        # Without the time in which ours starts and reads its bodies: then it takes nothing from a server at work.
        generator_cores=seen.pop("cpu_s", cpu_s) / seen["elapsed_s"] if seen["elapsed_s"] else 0.0,
        server_cores=used.tree_s / wall,
        other_cores=max(0.0, used.machine_s - used.tree_s - cpu_s) / wall,
        **seen,
    )


def _children_cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _read_wrk(output: str) -> dict[str, Any]:
    line = next(line for line in output.splitlines() if line.startswith("RESULT "))
    seen = json.loads(line.removeprefix("RESULT "))
    errors = {name: seen[name] for name in ("status", "socket", "timeout") if seen[name]}
    ok = seen["requests"] - seen["status"]
    latency = {name: seen[name] for name in ("p50", "p95", "p99", "max", "mean")} if ok else {}
    return {
        "ok": ok,
        "elapsed_s": seen["elapsed_s"],
        "errors": errors,
        "latency_ms": latency,
        "repeated": seen["repeated"],
    }
