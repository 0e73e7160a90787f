"""Measures `emb-provider embed IN --out DIR`: its rate next to that of the engine, its memory, and resuming after kills.

The model is static, because it is the fastest one: a slower model hides what the command adds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from safetensors.numpy import save_file

from benchmarks import QUICK_HELP
from benchmarks.contenders import clean_environment
from benchmarks.report import describe_run, format_number, format_spread, log_progress, markdown_table, ratios
from emb_model_provider.hubs.local import find_bundled

if TYPE_CHECKING:
    from collections.abc import Sequence

_WIDTH = 32
_WORDS = (3, 9)
"""Words of a text: uniform, without the upper end."""
_BLOCK_ROWS = 50_000
_POLL_S = 0.05
_ENGINE = """
import json, sys, time
from emb_model_provider import Embedder
from emb_model_provider.settings import Settings

model, source, cache = sys.argv[1:]
texts = [json.loads(line)["text"] for line in open(source, encoding="utf-8")]
settings = Settings.from_values(cache_dir=cache, offline=True, result_cache_mb=0)
with Embedder(model, source="local", settings=settings) as embedder:
    embedder.embed(texts[:10_000])
    start = time.perf_counter()
    embedder.embed(texts)
    print(len(texts) / (time.perf_counter() - start))
"""


@dataclass(frozen=True, slots=True)
class Run:
    """A command that ended."""

    rows: int
    parts: int
    start_s: float
    """Until the first row: Python, the scan of the input, and the model."""
    rows_s: float
    """From there to the end."""
    peak_mib: float

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.rows_s


@dataclass(frozen=True, slots=True)
class Kills:
    """A job that was killed several times, and ended."""

    kills: int
    missing_rows: int
    repeated_rows: int
    different_files: int


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse_options(arguments)
    with tempfile.TemporaryDirectory(prefix="benchmarks-bulk-", dir=options.directory) as name:
        scratch = Path(name)
        model = write_model(scratch / "model")
        rates = _measure_rates(model, scratch, options)
        memory = _measure_memory(model, scratch, options)
        killed = _measure_kills(model, scratch, options)
    print(_report(options, rates, memory, killed))
    return 1 if killed.missing_rows or killed.repeated_rows or killed.different_files else 0


def write_model(directory: Path) -> Path:
    """Write static embeddings with the tokenizer of the bundled model and random vectors."""
    directory.mkdir()
    tokenizer = find_bundled() / "tokenizer.json"
    shutil.copyfile(tokenizer, directory / "tokenizer.json")
    size = len(json.loads(tokenizer.read_bytes())["model"]["vocab"])
    table = np.random.default_rng(1).normal(size=(size, _WIDTH)).astype(np.float32)
    save_file({"embedding.weight": table}, directory / "model.safetensors")
    prefix = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{prefix}.StaticEmbedding"},
        {"idx": 1, "name": "1", "path": "1_Normalize", "type": f"{prefix}.Normalize"},
    ]
    (directory / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (directory / "1_Normalize").mkdir()
    return directory


def write_input(path: Path, rows: int) -> Path:
    """Write rows with an id and a text of a few words that the tokenizer knows, all different."""
    vocabulary = json.loads((find_bundled() / "tokenizer.json").read_bytes())["model"]["vocab"]
    words = np.array([word for word in vocabulary if word.isascii() and word.isalpha() and len(word) > 1], dtype=object)
    draw = np.random.default_rng(2)
    with path.open("wb") as file:
        for start in range(0, rows, _BLOCK_ROWS):
            count = min(_BLOCK_ROWS, rows - start)
            lengths = draw.integers(*_WORDS, size=count)
            drawn = words[draw.integers(len(words), size=int(lengths.sum()))].tolist()
            ends = np.cumsum(lengths).tolist()
            lines = []
            for index, (end, length) in enumerate(zip(ends, lengths.tolist(), strict=True), start):
                text = f"{' '.join(drawn[end - length : end])} {index}"
                lines.append(orjson.dumps({"id": f"doc-{index}", "text": text}, option=orjson.OPT_APPEND_NEWLINE))
            file.writelines(lines)
    return path


def _parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bulk", description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the largest input (default: %(default)s)")
    parser.add_argument(
        "--rate-rows", type=int, default=500_000, help="rows of the inputs that are timed (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the comparison (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=20, help="(default: %(default)s)")
    parser.add_argument(
        "--kill-rows", type=int, default=1_000_000, help="rows of the killed job (default: %(default)s)"
    )
    parser.add_argument(
        "--directory", type=Path, help="where inputs and vectors are written (default: that of the system)"
    )
    parser.add_argument("--quick", action="store_true", help=QUICK_HELP)
    options = parser.parse_args(arguments)
    if options.quick:
        options.rows, options.rate_rows, options.rounds, options.kills, options.kill_rows = 20_000, 10_000, 1, 2, 20_000
    return options


def _measure_rates(model: Path, scratch: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Return rows per second of each round: the engine, then the command for each format."""
    source = write_input(scratch / "rates.jsonl", options.rate_rows)
    rates: dict[str, list[float]] = {}
    for number in range(options.rounds):
        log_progress(f"rates: round {number + 1}/{options.rounds}")
        command = [sys.executable, "-c", _ENGINE, str(model), str(source), str(scratch / "cache")]
        done = subprocess.run(command, env=_environment(scratch), capture_output=True, text=True, check=True)
        rates.setdefault("engine", []).append(float(done.stdout))
        for output in ("parquet", "npy", "jsonl"):
            run = _run(model, source, scratch / "out", "--format", output)
            shutil.rmtree(scratch / "out")
            rates.setdefault(output, []).append(run.rows_per_s)
    source.unlink()
    return rates


def _measure_memory(model: Path, scratch: Path, options: argparse.Namespace) -> list[Run]:
    runs = []
    for rows in (options.rows // 100, options.rows // 10, options.rows):
        log_progress(f"memory: {rows:,} rows")
        source = write_input(scratch / "memory.jsonl", rows)
        runs.append(_run(model, source, scratch / "out"))
        shutil.rmtree(scratch / "out")
        log_progress(f"  {runs[-1].rows_per_s:,.0f} rows/s, {runs[-1].peak_mib:.0f} MiB")
    source.unlink()
    return runs


def _measure_kills(model: Path, scratch: Path, options: argparse.Namespace) -> Kills:
    """Kill a job at random moments after it has completed at least one more part, and compare its files in the end."""
    source, moments = write_input(scratch / "kills.jsonl", options.kill_rows), random.Random(3)  # noqa: S311
    part_rows = max(1, options.kill_rows // (4 * options.kills))
    extra = ("--part-rows", str(part_rows))
    _run(model, source, scratch / "whole", *extra)
    out, kept, kills = scratch / "out", 0, 0
    for number in range(options.kills):
        process = _start(model, source, out, "--progress", "none", *extra, stderr=subprocess.DEVNULL)
        wanted = kept + moments.randrange(1, 4)
        while _count_parts(out) < wanted and process.poll() is None:
            time.sleep(_POLL_S / 5)
        time.sleep(moments.random() * 0.5)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        kept = _count_parts(out)
        log_progress(f"kill {number + 1}/{options.kills}: {kept} parts are complete")
    run = _run(model, source, out, *extra)
    numbers = np.sort(np.concatenate([_numbers(path) for path in sorted(out.glob("part-*.parquet"))]))
    unique = np.unique(numbers)
    before, after = _digests(scratch / "whole"), _digests(out)
    return Kills(
        kills=kills,
        missing_rows=run.rows - len(unique),
        repeated_rows=len(numbers) - len(unique),
        different_files=sum(before.get(name) != after.get(name) for name in before.keys() | after.keys()),
    )


def _run(model: Path, source: Path, out: Path, *arguments: str) -> Run:
    """Run a command to its end, and watch its memory and its progress."""
    started = time.perf_counter()
    process = _start(model, source, out, "--progress", "json", "--json", *arguments, stderr=subprocess.PIPE)
    began: list[float] = []
    lines: list[str] = []

    def read() -> None:
        assert process.stderr is not None  # noqa: S101 - piped
        for line in process.stderr:
            lines.append(line)
            if not began and '"embed"' in line:
                began.append(time.perf_counter())

    reader = threading.Thread(target=read)
    reader.start()
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, _peak_mib(process.pid))
        time.sleep(_POLL_S)
    ended = time.perf_counter()
    reader.join()
    if process.returncode != 0:
        raise RuntimeError(f"The command failed:\n{''.join(lines)[-3000:]}")
    assert process.stdout is not None  # noqa: S101 - piped
    result: dict[str, Any] = json.loads(process.stdout.read())
    return Run(result["rows"], result["parts"], began[0] - started, ended - began[0], peak)


def _start(model: Path, source: Path, out: Path, *arguments: str, stderr: int) -> subprocess.Popen[str]:
    command = [
        Path(sys.executable).with_name("emb-provider"), "embed", source, "--out", out, "--id-column", "id",
        "--model", model, "--source", "local", *arguments,
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        env=_environment(out.parent),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def _environment(scratch: Path) -> dict[str, str]:
    return clean_environment() | {"EMB_PROVIDER_CACHE_DIR": str(scratch / "cache"), "EMB_PROVIDER_OFFLINE": "true"}


def _peak_mib(pid: int) -> float:
    """Return the highest resident memory of a process so far, or 0 if it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), 0.0)


def _count_parts(out: Path) -> int:
    return sum(1 for _ in out.glob("part-*.parquet"))


def _numbers(path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    import pyarrow.parquet as pq

    return pq.read_table(path, columns=["row"])["row"].to_numpy()


def _digests(out: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("[!.]*")}


def _report(options: argparse.Namespace, rates: dict[str, list[float]], memory: Sequence[Run], killed: Kills) -> str:
    notes = [
        f"Static embeddings of {_WIDTH} dimensions with the tokenizer of the bundled model; JSON Lines with an id and a text of "
        f"{_WORDS[0]} to {_WORDS[1] - 1} words and a number",
        f"Rates: {options.rounds} round(s) of {options.rate_rows:,} rows, one after the other; the engine gets all texts in one "
        "call of `Embedder.embed`; of the command without its start",
        "Peak: the highest resident memory of the process (VmHWM). Start: Python, the scan of the input, and the model",
        f"Kills: SIGKILL at random moments, up to three parts after the last start, of a job of {options.kill_rows:,} rows in "
        f"{4 * options.kills} parts",
    ]
    engine = rates["engine"]
    named = {"engine": "engine", **{name: f"command, {name}" for name in ("parquet", "npy", "jsonl")}}
    return "\n\n".join(
        [
            "# Bulk embedding",
            describe_run("benchmarks.bulk", notes),
            "## Rate",
            markdown_table(
                ["", "rows/s", "÷ engine"],
                [
                    [named[name], format_spread(values), format_spread(ratios(values, engine))]
                    for name, values in rates.items()
                ],
            ),
            "## Memory",
            markdown_table(
                ["Rows", "parts", "start, s", "rows, s", "rows/s", "peak, MiB"],
                [
                    [
                        f"{run.rows:,}",
                        str(run.parts),
                        *map(format_number, (run.start_s, run.rows_s, run.rows_per_s, run.peak_mib)),
                    ]
                    for run in memory
                ],
            ),
            "## Kills",
            markdown_table(
                ["Kills", "rows", "missing rows", "repeated rows", "files with other bytes"],
                [
                    [
                        str(killed.kills),
                        f"{options.kill_rows:,}",
                        *map(str, (killed.missing_rows, killed.repeated_rows, killed.different_files)),
                    ]
                ],
            ),
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
