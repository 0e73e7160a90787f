"""A model at one precision, loaded and measured in a process of its own: `python -m emb_model_provider.cli.fidelity_worker`.

A fresh process, so that its memory and the time to load are this model's alone. It prints one JSON object a line:
first what was loaded, then, for every line that it reads (`short` or `doc`), how many texts it embedded a second.
What libraries print goes to stderr.
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

from emb_model_provider.artifacts.compile_job import reserve_stdout
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
_LENGTHS: dict[str, Callable[[np.random.Generator], int]] = {
    "short": lambda chance: int(chance.integers(8, 19)),
    "doc": lambda chance: round(min(256.0, max(8.0, chance.lognormal(4.32, 0.7)))),
}
"""Tokens of a text: 13 and 92 in the mean, as in the benchmarks."""
_BATCH = {"short": 32, "doc": 8}


def main() -> None:
    """Read a job from the first line of stdin, measure it, and go on until stdin ends."""
    # Ctrl-C reaches the whole group: whoever started this process ends it, without a traceback.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    out = reserve_stdout()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    logging.getLogger("emb_model_provider").setLevel(logging.INFO)

    def tell(values: dict[str, Any]) -> None:
        out.write(json.dumps(values) + "\n")
        out.flush()

    try:
        backend, loaded = _load(**json.loads(sys.stdin.readline()))
    except ProviderError as error:
        tell({"error": error.message})
        return
    tell(loaded)
    for line in sys.stdin:
        tell({"texts_per_s": _rate(backend, line.strip())})
    backend.close()


def _load(
    model: str, source: str | None, precision: str, backend: str | None, device: str | None
) -> tuple[Backend, dict[str, Any]]:
    """Prepare and load a model; floors are not asked: a figure below one is what the table is for.

    A backend or device that is None is as the settings have it for the model.
    """
    settings, _ = load_settings()
    hubs = settings.hubs
    chosen = resolve_model(settings, model, source=source)  # type: ignore[arg-type]  # click has checked it
    spec = replace(
        chosen,
        precision=precision,  # type: ignore[arg-type]  # likewise
        backend=backend or chosen.backend,  # type: ignore[arg-type]  # likewise
        device=device or chosen.device,
    )
    snapshot = fetch_snapshot(spec, hubs, lambda _: None)
    no_floors = FidelitySettings(
        fidelity_floors=dict.fromkeys(get_args(FidelityPrecision), 0.0), measure_fidelity=True
    )
    prepared = BackendPreparer(hubs, no_floors, settings.trust).prepare(spec, snapshot)
    started = time.perf_counter()
    loaded = prepared.load()
    loaded.embed(_batch(loaded, "short", np.random.default_rng(0)))
    load_s = time.perf_counter() - started
    description = loaded.description
    return loaded, {
        "precision": description.precision,
        "computed": description.compute or description.precision,
        "backend": description.backend,
        "device": description.device,
        "fidelity": asdict(description.fidelity) if description.fidelity is not None else None,
        "floor": settings.fidelity.floors[precision],
        "disk_bytes": prepared.size,
        "resident_bytes": _status("VmRSS"),
        "peak_bytes": _status("VmHWM"),
        "load_s": load_s,
        "notes": list(description.notes),
    }


def _rate(backend: Backend, kind: str) -> float:
    """Return texts a second, with as many batches side by side as the backend has lanes."""
    chance = np.random.default_rng(len(kind))
    batches = [_batch(backend, kind, chance) for _ in range(16)]
    ends = time.perf_counter() + _ROUND_S
    done: list[int] = []

    def lane(first: int) -> None:
        place = first
        while time.perf_counter() < ends:
            batch = batches[place % len(batches)]
            backend.embed(batch)
            done.append(len(batch.ids))
            place += backend.streams

    started = time.perf_counter()
    with ThreadPoolExecutor(backend.streams) as lanes:
        list(lanes.map(lane, range(backend.streams)))  # raises what a lane raised
    return sum(done) / (time.perf_counter() - started)


def _batch(backend: Backend, kind: str, chance: np.random.Generator) -> TokenBatch:
    description = backend.description
    lengths = (min(_LENGTHS[kind](chance), description.max_length) for _ in range(_BATCH[kind]))
    ids = [chance.integers(description.vocab_size, size=length).tolist() for length in lengths]
    return TokenBatch(ids=ids, prompt_lengths=[0] * len(ids))


def _status(field: str) -> int | None:
    """Return one of this process's figures in bytes; None where the platform does not tell (not Linux)."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), None)


if __name__ == "__main__":
    main()
