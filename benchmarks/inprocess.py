"""Rates without HTTP, in a process of its own: what the serving process could reach at most.

`measure` starts it; as a program it reads a job as JSON from stdin and writes the result as JSON to stdout. Kinds:

- engine: our service without HTTP (tokenizer, batcher, worker, backend), called by as many tasks as a server has
  connections;
- backend: tokenizer and model only, called by as many threads as the backend has lanes;
- sentence-transformers: `SentenceTransformer.encode`, called by one thread;
- memory: batches of given shapes through the model, and the memory that this process then holds;
- gemm: matrix products of the model's own shapes and of a large one.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cache import ROOT
from benchmarks.resources import usage
from benchmarks.workloads import read_inputs
from emb_model_provider.hubs.local import find_bundled

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.backends.base import Backend
    from emb_model_provider.serving.engine import Engine
    from emb_model_provider.settings import Settings

_UNBOUNDED = 1 << 50
GEMM_SHAPES = ((416, 384, 1536), (2944, 384, 1536), (2048, 2048, 2048))
"""32 short texts, and 32 documents, through the first linear layer of the model's feed-forward part; a large one."""


def measure(job: dict[str, Any], *, timeout_s: float = 1800.0) -> dict[str, Any]:
    """Run a job in a new process, with the environment that a contender gets."""
    from benchmarks.contenders import plain_environment

    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.inprocess"],
        input=json.dumps(job), cwd=ROOT, env=plain_environment(), capture_output=True, text=True,
        check=False, timeout=timeout_s,
    )  # fmt: skip
    if done.returncode != 0:
        raise RuntimeError(f"measuring {job['kind']} in process failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# --- in the child ------------------------------------------------------------------------------------------


def _main(job: dict[str, Any]) -> dict[str, Any]:
    match job["kind"]:
        case "engine":
            import uvloop  # as under uvicorn

            return uvloop.run(_engine(job))
        case "backend":
            return _backend(job)
        case "memory":
            return _memory(job)
        case "sentence-transformers":
            return _sentence_transformers(job)
        case "gemm":
            return _gemm(job)
    raise ValueError(job["kind"])


def _settings(job: dict[str, Any]) -> Settings:
    from emb_model_provider.settings import Settings

    # The first load compiles; it may take longer than a request.
    return Settings.from_values(**{"request_timeout_s": 600, "offline": True} | job["settings"])


async def _engine(job: dict[str, Any]) -> dict[str, Any]:
    from emb_model_provider.management.manager import ModelManager
    from emb_model_provider.registry import Registry

    settings = _settings(job)
    registry = Registry(
        settings.served_models(),
        manager=ModelManager(settings),
        hubs=settings.hubs,
        trust=settings.trust,
        batching=settings.batching,
        limits=settings.limits,
        max_artifact_bytes=int(settings.max_artifacts_gb * 1024**3),
        on_batch=lambda _: None,
    )
    async with registry.using(registry.default_alias) as engine:
        cases = await _cases(engine, job)
        described = engine.description
    await registry.stop()
    return {"cases": cases, "about": f"{described.backend} {described.precision}"}


async def _cases(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    from emb_model_provider.serving.engine import EmbedOptions

    options = EmbedOptions()
    cases = {}
    for case in job["cases"]:
        inputs = read_inputs(Path(case["bodies"]))

        async def run(seconds: float, first: int, inputs: Any = inputs, case: Any = case) -> dict[str, Any]:
            calls = itertools.count(first)
            latencies: list[float] = []
            end = time.perf_counter() + seconds

            async def client() -> None:
                while (began := time.perf_counter()) < end:
                    await engine.embed(inputs[next(calls) % len(inputs)], options)
                    latencies.append(time.perf_counter() - began)

            return await _observed_async(
                latencies, lambda: asyncio.gather(*(client() for _ in range(case["connections"])))
            )

        await run(job["warm_up_s"], len(inputs) // 2)
        cases[case["name"]] = await run(job["seconds"], 0)
    return cases


def _backend(job: dict[str, Any]) -> dict[str, Any]:
    from emb_model_provider.backends.base import TokenBatch
    from emb_model_provider.backends.tokenization import Tokenization
    from emb_model_provider.serving.request_options import postprocess

    backend = _load_backend(_settings(job))
    tokenization = Tokenization(backend.description)

    def embed(texts: list[str]) -> None:
        encoded = tokenization.encode(texts, truncate="END")
        vectors = backend.embed(TokenBatch(ids=encoded.ids, prompt_lengths=encoded.prompt_lengths))
        postprocess(vectors, dimensions=None, normalize=True)

    cases = _threaded(job, embed, backend.streams)
    described = backend.description
    about = f"{described.backend} {described.precision}, {backend.lanes} lanes"
    backend.close()
    return {"cases": cases, "about": about}


def _memory(job: dict[str, Any]) -> dict[str, Any]:
    from emb_model_provider.backends.base import TokenBatch

    backend = _load_backend(_settings(job))
    vocabulary = backend.description.vocab_size

    def embed(shape: list[int]) -> None:
        rows, length = shape
        ids = [[(row * 31 + place * 7) % vocabulary for place in range(length)] for row in range(rows)]
        backend.embed(TokenBatch(ids=ids, prompt_lengths=[0] * rows))

    def held() -> dict[str, float]:
        status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        kib = {key: int(value.split()[0]) for key, _, value in (line.partition(":") for line in status)
               if key in {"VmRSS", "VmHWM"}}  # fmt: skip
        return {"resident_mib": kib["VmRSS"] / 1024, "peak_mib": kib["VmHWM"] / 1024}

    loaded, steps = held(), []
    with ThreadPoolExecutor(backend.streams) as pool:
        for shapes in job["steps"]:
            list(pool.map(embed, shapes))
            steps.append({"shapes": len(shapes), **held()})
    described = backend.description
    about = f"{described.backend} {described.precision}, {backend.lanes} lanes"
    backend.close()
    return {"loaded": loaded, "steps": steps, "threads": backend.streams, "about": about}


def _load_backend(settings: Settings) -> Backend:
    from emb_model_provider.artifacts.prepare import prepare_backend
    from emb_model_provider.hubs.fetch import fetch_snapshot

    spec = settings.served_models().specs[0]
    prepared = prepare_backend(
        spec,
        fetch_snapshot(spec, settings.hubs),
        trust_remote_code=False,
        cache_dir=settings.cache_dir,
        max_cache_bytes=_UNBOUNDED,
        on_compiling=lambda: None,
    )
    return prepared.load()


def _sentence_transformers(job: dict[str, Any]) -> dict[str, Any]:
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(
        str(find_bundled()),
        device="cpu",
        local_files_only=True,
        model_kwargs={"dtype": getattr(torch, job["dtype"])},
    )

    def embed(texts: list[str]) -> None:
        model.encode(texts, batch_size=len(texts), show_progress_bar=False)

    return {
        "cases": _threaded(job, embed, 1),
        "about": f"torch {job['dtype']}, {torch.get_num_threads()} threads",
    }


def _gemm(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    rates: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for rows, inner, columns in GEMM_SHAPES:
            # torch.nn.Linear holds its weight as (out, in): so do we.
            left, right = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype).T
            torch.matmul(left, right)
            calls, began = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - began) < job["seconds"] / 2:
                torch.matmul(left, right)
                calls += 1
            rate = 2 * rows * inner * columns * calls / elapsed
            rates.setdefault(f"{rows}x{inner}x{columns}", {})[name] = rate
    return {"rates": rates, "about": f"torch.matmul, {torch.get_num_threads()} threads"}


def _threaded(job: dict[str, Any], embed: Callable[[list[str]], None], streams: int) -> dict[str, Any]:
    cases = {}
    with ThreadPoolExecutor(streams) as pool:
        for case in job["cases"]:
            inputs = read_inputs(Path(case["bodies"]))
            threads = min(streams, case.get("threads") or streams)
            _run_threads(pool, threads, embed, inputs, job["warm_up_s"], len(inputs) // 2)
            cases[case["name"]] = _run_threads(pool, threads, embed, inputs, job["seconds"], 0)
    return cases


def _run_threads(
    pool: ThreadPoolExecutor,
    threads: int,
    embed: Callable[[list[str]], None],
    inputs: list[list[str]],
    seconds: float,
    first: int,
) -> dict[str, Any]:
    calls, latencies, lock = itertools.count(first), [], threading.Lock()
    end = time.perf_counter() + seconds

    def client() -> None:
        mine: list[float] = []
        while (began := time.perf_counter()) < end:
            embed(inputs[next(calls) % len(inputs)])
            mine.append(time.perf_counter() - began)
        with lock:
            latencies.extend(mine)

    before, began = usage(os.getpid()), time.perf_counter()
    for future in [pool.submit(client) for _ in range(threads)]:
        future.result()
    return _seen(latencies, time.perf_counter() - began, before)


async def _observed_async(latencies: list[float], run: Callable[[], Any]) -> dict[str, Any]:
    before, began = usage(os.getpid()), time.perf_counter()
    await run()
    return _seen(latencies, time.perf_counter() - began, before)


def _seen(latencies: list[float], elapsed: float, before: Any) -> dict[str, Any]:
    used = usage(os.getpid()).since(before)
    ordered = sorted(latencies)
    rank = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
    return {
        "ok": len(ordered),
        "elapsed_s": elapsed,
        "latency_ms": {
            name: 1000 * ordered[max(0, math.ceil(share * len(ordered)) - 1)] for name, share in rank.items()
        },
        "server_cores": used.tree_s / elapsed,
        "other_cores": max(0.0, used.machine_s - used.tree_s) / elapsed,
    }


if __name__ == "__main__":
    print(json.dumps(_main(json.load(sys.stdin))))
