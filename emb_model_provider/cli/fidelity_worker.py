"""Loads and measures a model at one precision: `python -m emb_model_provider.cli.fidelity_worker`.

It runs in its own process, so that memory and load time are those of this model alone. It reads a job from the first
line of stdin, and then for each line (`short` or `doc`) embeds texts of that kind. It answers each line with a JSON
object on one line: the figures of the loaded model, then the number of texts per second. Output of libraries goes to
stderr.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import psutil

from emb_model_provider.artifacts.compiler_process import reserve_stdout
from emb_model_provider.artifacts.prepare import BackendPreparer
from emb_model_provider.backends.base import TokenBatch
from emb_model_provider.errors import ProviderError
from emb_model_provider.hubs.fetch import fetch_snapshot
from emb_model_provider.model_resolver import resolve_model
from emb_model_provider.settings import FidelitySettings
from emb_model_provider.settings.fields import FidelityPrecision
from emb_model_provider.settings.loading import load_settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from emb_model_provider.backends.base import Backend

_ROUND_S = 1.0
_BATCHES = 16
_BATCH_SIZE = {"short": 32, "doc": 8}
_LENGTHS: dict[str, Callable[[np.random.Generator], int]] = {
    "short": lambda random: int(random.integers(8, 19)),
    "doc": lambda random: round(min(256.0, max(8.0, random.lognormal(4.32, 0.7)))),
}
"""Tokens of a text: 13 and 92 on average, as in the benchmarks."""


def main() -> None:
    """Load the model of the first line of stdin, and measure it for each further line."""
    # Ctrl-C reaches the whole process group. The parent ends this process, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    output = reserve_stdout()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    logging.getLogger("emb_model_provider").setLevel(logging.INFO)

    def answer(values: dict[str, Any]) -> None:
        output.write(json.dumps(values) + "\n")
        output.flush()

    try:
        backend, figures = load(**json.loads(sys.stdin.readline()))
    except ProviderError as error:
        answer({"error": error.message})
        return
    answer(figures)
    for line in sys.stdin:
        answer({"texts_per_s": _measure_rate(backend, line.strip())})
    backend.close()


def load(
    model: str, source: str | None, precision: str, backend: str | None, device: str | None
) -> tuple[Backend, dict[str, Any]]:
    """Prepare and load a model, and return its backend and figures. None: as configured.

    Floors do not apply, because the result shows the figures of models that are below their floor.
    """
    settings, _ = load_settings()
    configured = resolve_model(settings, model, source=source)  # type: ignore[arg-type]  # click has checked it
    spec = replace(
        configured,
        precision=precision,  # type: ignore[arg-type]  # likewise
        backend=backend or configured.backend,  # type: ignore[arg-type]  # likewise
        device=device or configured.device,
    )
    snapshot = fetch_snapshot(spec, settings.hubs, trust=settings.trust)
    zero = dict.fromkeys(get_args(FidelityPrecision), 0.0)
    no_floors = FidelitySettings(fidelity_floors=zero, agreement_floors=zero, measure_fidelity=True)
    prepared = BackendPreparer(settings.hubs, no_floors, settings.trust).prepare(spec, snapshot)
    started = time.perf_counter()
    loaded = prepared.load()
    loaded.run(_make_batch(loaded, "short", np.random.default_rng(0)))
    load_s = time.perf_counter() - started
    description = loaded.description
    return loaded, {
        "precision": description.precision,
        "computed": description.compute or description.precision,
        "backend": description.backend,
        "device": description.device,
        "fidelity": asdict(description.fidelity) if description.fidelity is not None else None,
        "agreement": dict(description.fidelity.agreement) if description.fidelity is not None else {},
        "floor": settings.fidelity.floors[precision],
        "agreement_floor": settings.fidelity.lowest_agreement[precision],
        "disk_bytes": prepared.size,
        "resident_bytes": psutil.Process().memory_info().rss,
        "peak_bytes": _peak_bytes(),
        "load_s": load_s,
        "notes": list(description.notes),
    }


def _measure_rate(backend: Backend, kind: str) -> float:
    """Return texts per second, with one batch in each stream of the backend."""
    random = np.random.default_rng(len(kind))
    batches = [_make_batch(backend, kind, random) for _ in range(_BATCHES)]
    started = time.perf_counter()
    counts: list[int] = []

    def run_stream(index: int) -> None:
        while time.perf_counter() < started + _ROUND_S:
            batch = batches[index % len(batches)]
            backend.run(batch)
            counts.append(len(batch.ids))
            index += backend.streams

    with ThreadPoolExecutor(backend.streams) as pool:
        list(pool.map(run_stream, range(backend.streams)))  # raises the errors of the threads
    return sum(counts) / (time.perf_counter() - started)


def _make_batch(backend: Backend, kind: str, random: np.random.Generator) -> TokenBatch:
    description = backend.description
    lengths = (min(_LENGTHS[kind](random), description.max_length) for _ in range(_BATCH_SIZE[kind]))
    ids = [random.integers(description.vocab_size, size=length).tolist() for length in lengths]
    return TokenBatch(ids=ids, prompt_lengths=[0] * len(ids))


def _peak_bytes() -> int | None:
    """Return the peak of this process's resident memory, or None if the system is not Linux.

    psutil does not report it, and getrusage() includes the memory of the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


if __name__ == "__main__":
    main()
