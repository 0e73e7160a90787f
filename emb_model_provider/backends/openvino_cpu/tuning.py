"""Chooses how OpenVINO runs a model on this processor, by measurement.

No choice is right for every processor and model: without the fused attention kernel, batches of short texts are 5 to 31 %
faster, and those of long texts up to 4 % slower or 7 % faster. Each option is compared with the best combination so far
in interleaved rounds, so that a machine that becomes slower meanwhile does not decide.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any

import numpy as np

from emb_model_provider.backends.base import TokenBatch, Tuning
from emb_model_provider.backends.hardware import free_memory, usable_cpus
from emb_model_provider.backends.openvino_cpu.backend import OpenVinoBackend
from emb_model_provider.backends.openvino_cpu.runtime import float_precision, stream_layout

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from emb_model_provider.backends.base import ModelDescription

Workload = tuple[int, int]
"""Inputs of a batch, and the length of each in tokens."""

_BATCHES: tuple[Workload, ...] = ((8, 13), (32, 13), (16, 92), (4, 256))
_ALONE: tuple[Workload, ...] = ((1, 13), (1, 92))
_MIN_GAIN = 1.05
"""A smaller gain is not distinguished from noise."""
_MIN_GAIN_UNFUSED = 1.1
"""The least gain without the fused kernel, because that takes more memory: 20 % for a model of 22 million parameters."""
_MAX_LOSS = 0.9
"""No workload may become slower than this share of its speed before."""
_MIN_ROUNDS, _MAX_ROUNDS = 5, 25
_MIN_GAIN_ROUNDS = 3
"""Fewer are enough for the gain of quantized activations, because they are not compared with a small threshold."""
_MEASURED_S = 0.02
"""A measurement takes at least about this long."""


@dataclass(frozen=True, slots=True)
class Trial:
    """An option that was compared with the best combination before it."""

    tuning: Tuning
    ratios: Mapping[Workload, float]
    """By workload: median of its speed relative to that combination."""
    gain: float
    """Geometric mean of the ratios."""
    is_kept: bool


def tune(
    graph: Path,
    description: ModelDescription,
    *,
    within_s: float,
    cpus: int | None = None,
    on_trial: Callable[[Trial], object] = lambda _: None,
) -> Tuning:
    """Return the fastest options for a model on this processor that can be found within `within_s` seconds.

    Options for which there is not enough time or memory keep their defaults. All processors should be idle.

    Args:
        graph: See `OpenVinoBackend`.
        description: Likewise. Its own tuning is ignored.
        within_s: Approximate limit of the time, in seconds.
        cpus: Number of processors to use; None for all that this process can use.
        on_trial: Called with each trial.

    Raises:
        LoadError: The graph cannot be read or compiled.
    """
    end = time.monotonic() + within_s
    best = Tuning()
    if graph.with_suffix(".bin").stat().st_size * 2 > free_memory():
        return best
    cpus = usable_cpus() if cpus is None else cpus
    champion = _Contender(graph, description, best, cpus)
    try:
        for candidates, workloads in _options(description.max_length, cpus):
            for change in candidates:
                candidate = replace(best, **change)
                left_s = end - time.monotonic() - champion.load_s
                rounds = int(left_s / (2 * champion.seconds(workloads)))
                if candidate == best or rounds < _MIN_ROUNDS:
                    continue
                challenger = _Contender(graph, description, candidate, cpus)
                ratios = _compare(champion, challenger, workloads, min(rounds, _MAX_ROUNDS))
                gain = _mean(ratios)
                least = _MIN_GAIN if candidate.fused_attention or not best.fused_attention else _MIN_GAIN_UNFUSED
                is_kept = gain >= least and min(ratios.values()) >= _MAX_LOSS
                on_trial(Trial(candidate, ratios, gain, is_kept))
                if is_kept:
                    champion, challenger = challenger, champion
                    best = candidate
                challenger.backend.close()
    finally:
        champion.backend.close()
    return best


def measure_int8_gain(
    graph: Path, description: ModelDescription, *, within_s: float, cpus: int | None = None
) -> float | None:
    """Return how many times as fast a model is with quantized activations as without, on this processor.

    Without, the same graph runs at the speed of the precision `auto`. All processors should be idle.

    Args:
        graph: See `OpenVinoBackend`.
        description: Likewise. It computes in int8.
        within_s: Approximate limit of the time, in seconds, if that allows some rounds.
        cpus: Number of processors to use; None for all that this process can use.

    Returns:
        The geometric mean over the kinds of batches; None if there is not enough memory to load the model twice.

    Raises:
        LoadError: The graph cannot be read or compiled.
    """
    end = time.monotonic() + within_s
    if graph.with_suffix(".bin").stat().st_size * 6 > free_memory():  # 4 bytes per weight without, and 1 with
        return None
    cpus = usable_cpus() if cpus is None else cpus
    workloads = _fitting(_BATCHES, description.max_length)
    floats = _Contender(graph, replace(description, compute=float_precision()), description.tuning, cpus)
    try:
        integers = _Contender(graph, description, description.tuning, cpus)
        try:
            seconds = floats.seconds(workloads) + integers.seconds(workloads)
            rounds = int((end - time.monotonic()) / seconds)
            return _mean(_compare(floats, integers, workloads, max(_MIN_GAIN_ROUNDS, min(rounds, _MAX_ROUNDS))))
        finally:
            integers.backend.close()
    finally:
        floats.backend.close()


def _mean(ratios: Mapping[Workload, float]) -> float:
    return math.prod(ratios.values()) ** (1 / len(ratios))


def _options(longest: int, cpus: int) -> Iterator[tuple[list[dict[str, Any]], list[Workload]]]:
    """Yield changes of the options, the most useful first, and the workloads that they are measured with."""
    batches = _fitting(_BATCHES, longest)
    yield [{"fused_attention": False}], batches
    layout = stream_layout(cpus)
    if layout.has_latency_request:
        yield [{"fused_attention_alone": False}], _fitting(_ALONE, longest)
        fewer = [streams for streams in (layout.streams // 2, 1) if streams]
        yield [{"streams": streams} for streams in dict.fromkeys(fewer)], batches


def _fitting(workloads: tuple[Workload, ...], longest: int) -> list[Workload]:
    return list(dict.fromkeys((rows, min(length, longest)) for rows, length in workloads))


class _Contender:
    """A backend whose speed is measured."""

    def __init__(self, graph: Path, description: ModelDescription, tuning: Tuning, cpus: int) -> None:
        started = time.monotonic()
        tuned = replace(description, tuning=tuning)
        self.backend = OpenVinoBackend(graph, tuned, cpus=cpus, compiles_latency=True)
        self.load_s = time.monotonic() - started
        self._vocab_size = description.vocab_size
        self._batches: dict[Workload, tuple[TokenBatch, int]] = {}

    def seconds(self, workloads: list[Workload]) -> float:
        """Return how long one measurement of all workloads takes."""
        return sum(self.measure(workload) * self._prepared(workload)[1] for workload in workloads)

    def measure(self, workload: Workload) -> float:
        """Return the seconds that a batch takes, on all streams at the same time, or alone if it is a single input."""
        batch, repeats = self._prepared(workload)
        tickets = count()

        def run() -> None:
            while next(tickets) < repeats:
                self.backend.run(batch)

        threads = [threading.Thread(target=run) for _ in range(1 if workload[0] == 1 else self.backend.streams)]
        started = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return (time.perf_counter() - started) / repeats

    def _prepared(self, workload: Workload) -> tuple[TokenBatch, int]:
        """Return a batch, and how often it runs in a measurement. The first call creates its kernels."""
        if workload not in self._batches:
            rows, length = workload
            ids = np.random.default_rng(0).integers(0, self._vocab_size, (rows, length)).tolist()
            batch = TokenBatch(ids=ids, prompt_lengths=[0] * rows)
            streams = 1 if rows == 1 else self.backend.streams
            self._batches[workload] = (batch, 2 * streams)
            self.measure(workload)
            repeats = math.ceil(_MEASURED_S / self.measure(workload) / streams) * streams
            self._batches[workload] = (batch, repeats)
        return self._batches[workload]


def _compare(
    champion: _Contender, challenger: _Contender, workloads: list[Workload], rounds: int
) -> dict[Workload, float]:
    ratios: dict[Workload, list[float]] = {workload: [] for workload in workloads}
    for number in range(rounds):
        for workload, found in ratios.items():
            pair = (champion, challenger) if number % 2 else (challenger, champion)
            seconds = {id(each): each.measure(workload) for each in pair}
            found.append(seconds[id(champion)] / seconds[id(challenger)])
    return {workload: statistics.median(found) for workload, found in ratios.items()}
