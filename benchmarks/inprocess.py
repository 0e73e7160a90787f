"""Measurements without HTTP, in a separate process: upper bounds for a server.

`measure` starts the process, which reads a job as JSON from stdin and writes the result as JSON to stdout. Kinds of jobs:

- engine: the engine of our service (tokenization, scheduler, model thread, backend), called by as many tasks as a server
  has connections;
- rerank-engine: likewise, for pairs of a query and a document;
- backend: tokenization and backend only, called by one thread per stream;
- sentence-transformers: `SentenceTransformer.encode`, called by one thread;
- cross-encoder: `CrossEncoder.predict`, called by one thread;
- memory: batches of given shapes on the backend, and the resident memory of the process;
- gemm: matrix products with shapes of the model, and a large one.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import ROOT
from benchmarks.contenders import clean_environment
from benchmarks.resources import cpu_time
from benchmarks.workloads import read_inputs, read_pairs
from emb_model_provider.hubs.local import find_bundled

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks.resources import CpuTime
    from emb_model_provider.backends.base import Backend
    from emb_model_provider.serving.engine import Engine
    from emb_model_provider.settings import Settings

GEMM_SHAPES = ((416, 384, 1536), (2944, 384, 1536), (2048, 2048, 2048))
"""32 short texts and 32 documents in the first linear layer of the model's feed-forward network; a large product."""


def measure(job: dict[str, Any], *, timeout_s: float = 1800.0) -> dict[str, Any]:
    """Run a job in a new process with the environment of a contender.

    Raises:
        RuntimeError: The process failed.
    """
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.inprocess"],
        input=json.dumps(job), cwd=ROOT, env=clean_environment(), capture_output=True, text=True,
        check=False, timeout=timeout_s,
    )  # fmt: skip
    if process.returncode != 0:
        raise RuntimeError(f"The measurement {job['kind']!r} failed:\n{process.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


# --- in the child process. Imports are local, because a job must not load the libraries of another one ------


def _main(job: dict[str, Any]) -> dict[str, Any]:
    match job["kind"]:
        case "engine" | "rerank-engine":
            import uvloop  # the event loop of the service

            return uvloop.run(_measure_engine(job))
        case "backend":
            return _measure_backend(job)
        case "memory":
            return _measure_memory(job)
        case "sentence-transformers":
            return _measure_sentence_transformers(job)
        case "cross-encoder":
            return _measure_cross_encoder(job)
        case "gemm":
            return _measure_gemm(job)
    raise ValueError(job["kind"])


def _settings(job: dict[str, Any]) -> Settings:
    from emb_model_provider.settings import Settings

    # The first load compiles the model, which may take longer than the default timeout.
    return Settings.from_values(**{"request_timeout_s": 600, "offline": True} | job["settings"])


async def _measure_engine(job: dict[str, Any]) -> dict[str, Any]:
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.registry import Registry, RegistryConfig

    settings = _settings(job)
    config = RegistryConfig(batching=settings.batching, limits=settings.limits, memory=settings.memory)
    registry = Registry(settings.served_models(), ModelManager(settings), config)
    async with registry.lease(registry.default_alias) as engine:
        call, read = _engine_call(engine, job["kind"])
        cases = {case["name"]: await _run_tasks(call, read(Path(case["bodies"])), case, job) for case in job["cases"]}
        description = engine.description
    await registry.stop()
    return {"cases": cases, "about": f"{description.backend} {description.precision}"}


def _engine_call(
    engine: Engine, kind: str
) -> tuple[Callable[[list[Any]], Awaitable[Any]], Callable[[Path], list[list[Any]]]]:
    """Return what runs the inputs of a body, and what reads them from a file."""
    from emb_model_provider.serving.engine import EmbedOptions, ScoreOptions

    if kind == "engine":
        return lambda texts: engine.embed(texts, EmbedOptions()), read_inputs

    async def score(pairs: list[tuple[str, str]]) -> list[float]:
        return (await engine.score_pairs(pairs, ScoreOptions(raw=True))).scores.tolist()

    return score, read_pairs


async def _run_tasks(
    call: Callable[[list[Any]], Awaitable[Any]], inputs: list[list[Any]], case: dict[str, Any], job: dict[str, Any]
) -> dict[str, Any]:

    async def run(seconds: float, first: int) -> dict[str, Any]:
        calls = itertools.count(first)
        latencies: list[float] = []
        cpu_before, start = cpu_time(os.getpid()), time.perf_counter()

        async def client() -> None:
            while (sent := time.perf_counter()) < start + seconds:
                await call(inputs[next(calls) % len(inputs)])
                latencies.append(time.perf_counter() - sent)

        await asyncio.gather(*(client() for _ in range(case["connections"])))
        return _summarize(latencies, time.perf_counter() - start, cpu_before)

    await run(job["warm_up_s"], len(inputs) // 2)
    result = await run(job["seconds"], 0)
    return result | ({"first": await call(inputs[0])} if job["kind"] == "rerank-engine" else {})


def _measure_backend(job: dict[str, Any]) -> dict[str, Any]:
    from emb_model_provider.backends.base import TokenBatch
    from emb_model_provider.backends.tokenization import Tokenization
    from emb_model_provider.serving.request_options import postprocess

    backend = _load_backend(_settings(job))
    tokenization = Tokenization(backend.description)

    def embed(texts: list[str]) -> None:
        encoded = tokenization.encode(texts, truncate="END")
        vectors = backend.run(TokenBatch(ids=encoded.ids, prompt_lengths=encoded.prompt_lengths)).dense
        postprocess(vectors, dimensions=None, normalize=True)

    cases = _run_threads(job, embed, backend.streams)
    backend.close()
    return {"cases": cases, "about": _about(backend)}


def _measure_memory(job: dict[str, Any]) -> dict[str, Any]:
    from emb_model_provider.backends.base import TokenBatch

    backend = _load_backend(_settings(job))
    vocabulary = backend.description.vocab_size

    def embed(shape: list[int]) -> None:
        rows, length = shape
        ids = [[(row * 31 + column * 7) % vocabulary for column in range(length)] for row in range(rows)]
        backend.run(TokenBatch(ids=ids, prompt_lengths=[0] * rows))

    loaded, steps = _memory_mib(), []
    with ThreadPoolExecutor(backend.streams) as pool:
        for shapes in job["steps"]:
            list(pool.map(embed, shapes))
            steps.append({"shapes": len(shapes), **_memory_mib()})
    backend.close()
    return {"loaded": loaded, "steps": steps, "about": _about(backend)}


def _memory_mib() -> dict[str, float]:
    # psutil does not report the peak.
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = {key: value for key, _, value in (line.partition(":") for line in lines)}
    names = {"resident_mib": "VmRSS", "peak_mib": "VmHWM"}
    return {name: int(fields[field].split()[0]) / 1024 for name, field in names.items()}


def _load_backend(settings: Settings) -> Backend:
    from emb_model_provider.artifacts.prepare import BackendPreparer
    from emb_model_provider.hubs.fetch import fetch_snapshot

    spec = settings.served_models().specs[0]
    preparer = BackendPreparer(settings.hubs, settings.fidelity, settings.trust)
    return preparer.prepare(spec, fetch_snapshot(spec, settings.hubs)).load()


def _about(backend: Backend) -> str:
    description = backend.description
    return f"{description.backend} {description.precision}, {backend.streams} streams"


def _measure_sentence_transformers(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(find_bundled()), device="cpu", local_files_only=True, model_kwargs={"dtype": getattr(torch, job["dtype"])}
    )

    def embed(texts: list[str]) -> None:
        model.encode(texts, batch_size=len(texts), show_progress_bar=False)

    about = f"torch {job['dtype']}, {torch.get_num_threads()} threads"
    return {"cases": _run_threads(job, embed, 1), "about": about}


def _measure_cross_encoder(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from sentence_transformers import CrossEncoder

    model = CrossEncoder(job["model"], device="cpu", local_files_only=True, model_kwargs={"dtype": torch.float32})

    def predict(pairs: list[tuple[str, str]]) -> list[float]:
        # The default size of a batch, 32.
        return model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False).tolist()

    cases = _run_threads(job, predict, 1, read_pairs)
    for case in job["cases"]:
        cases[case["name"]]["first"] = predict(read_pairs(Path(case["bodies"]))[0])
    return {"cases": cases, "about": f"torch float32, {torch.get_num_threads()} threads"}


def _measure_gemm(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    rates: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for rows, inner, columns in GEMM_SHAPES:
            # The right matrix is transposed, because torch.nn.Linear stores its weight as (out, in).
            left, right = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype).T
            torch.matmul(left, right)
            calls, start = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - start) < job["seconds"] / 2:
                torch.matmul(left, right)
                calls += 1
            rate = 2 * rows * inner * columns * calls / elapsed
            rates.setdefault(f"{rows}x{inner}x{columns}", {})[name] = rate
    return {"rates": rates, "about": f"torch.matmul, {torch.get_num_threads()} threads"}


def _run_threads(
    job: dict[str, Any],
    call: Callable[[list[Any]], object],
    threads: int,
    read: Callable[[Path], list[list[Any]]] = read_inputs,
) -> dict[str, Any]:
    def run(inputs: list[list[Any]], seconds: float, first: int) -> dict[str, Any]:
        calls = itertools.count(first)
        cpu_before, start = cpu_time(os.getpid()), time.perf_counter()

        def client(_: int) -> list[float]:
            latencies = []
            while (sent := time.perf_counter()) < start + seconds:
                call(inputs[next(calls) % len(inputs)])
                latencies.append(time.perf_counter() - sent)
            return latencies

        latencies = [latency for part in pool.map(client, range(threads)) for latency in part]
        return _summarize(latencies, time.perf_counter() - start, cpu_before)

    cases = {}
    with ThreadPoolExecutor(threads) as pool:
        for case in job["cases"]:
            inputs = read(Path(case["bodies"]))
            run(inputs, job["warm_up_s"], len(inputs) // 2)
            cases[case["name"]] = run(inputs, job["seconds"], 0)
    return cases


def _summarize(latencies: list[float], elapsed_s: float, cpu_before: CpuTime) -> dict[str, Any]:
    cpu = cpu_time(os.getpid()).since(cpu_before)
    ordered = sorted(latencies)
    shares = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    return {
        "ok": len(ordered),
        "elapsed_s": elapsed_s,
        "latency_ms": {
            name: 1000 * ordered[max(0, math.ceil(share * len(ordered)) - 1)] for name, share in shares.items()
        },
        "server_cores": cpu.tree_s / elapsed_s,
        "other_cores": max(0.0, cpu.machine_s - cpu.tree_s) / elapsed_s,
    }


if __name__ == "__main__":
    print(json.dumps(_main(json.load(sys.stdin))))
