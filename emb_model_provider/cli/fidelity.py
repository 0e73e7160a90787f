"""`emb-provider fidelity MODEL`: what every precision costs and saves, measured here."""

from __future__ import annotations

import contextlib
import json
import platform
import signal
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from emb_model_provider.cli.interrupt import GO_ON, run_until_interrupted
from emb_model_provider.cli.options import ModelId, json_option, source_option
from emb_model_provider.cli.output import out, say
from emb_model_provider.error_table import FAILED
from emb_model_provider.formatting import format_cosine

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from emb_model_provider.model_spec import Source


PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
_KINDS = ("short", "doc")
_PACKAGES = ("openvino", "nncf", "torch", "torchao", "bitsandbytes", "sentence-transformers")


class _Precisions(click.ParamType[tuple[str, ...]]):
    name = "LIST"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        chosen = tuple(part.strip().lower() for part in str(value).split(",") if part.strip())
        unknown = [one for one in chosen if one not in PRECISIONS]
        if unknown or not chosen:
            self.fail(f"{', '.join(unknown) or 'nothing'}: choose of {', '.join(PRECISIONS)}", param, ctx)
        return chosen


@click.command()
@click.argument("model", type=ModelId(), metavar="MODEL")
@click.option("--precisions", type=_Precisions(), default=",".join(PRECISIONS), show_default=True,
              help="Precisions to measure; the others are compared with the first.")  # fmt: skip
@source_option
@click.option(
    "--backend", type=click.Choice(["auto", "openvino", "torch"]), help="Default: as the settings say."
)
@click.option("--device", help="auto, cpu, cuda, cuda:N or mps. Default: as the settings say.")
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True,
              help="Measurements of throughput, taken in turn; the table has their medians.")  # fmt: skip
@json_option
def fidelity(
    model: str,
    precisions: tuple[str, ...],
    source: Source | None,
    backend: str | None,
    device: str | None,
    rounds: int,
    *,
    as_json: bool,
) -> None:
    """Measure MODEL at every precision.

    How near its vectors come to fp32, and what that saves. MODEL is an alias from your settings, the id of a
    repository, or a directory. What is compiled on the way is kept, so that serving it at that precision starts at
    once.

    JSON: {"model", "precisions": {precision: its figures, or {"error"}}, "about": {machine, versions, date}}.
    """
    _fetch(model, source)
    rows: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        measured: dict[str, FidelityWorker] = {}
        for precision in precisions:
            job = {
                "model": model,
                "source": source,
                "precision": precision,
                "backend": backend,
                "device": device,
            }
            say(f"{precision}: preparing")
            # Once to compile and compare, which takes memory and time of its own; then afresh.
            with start_fidelity_worker(job) as first:
                rows[precision] = first.loaded
            if "error" in first.loaded:
                continue
            process = stack.enter_context(start_fidelity_worker(job))
            rows[precision] = process.loaded
            if "error" not in process.loaded:
                measured[precision] = process
        _throughput(measured, rounds, rows)
    for precision, row in rows.items():
        for note in _notes(row):
            say(f"{precision}: {note}")
    about = _about()
    if as_json:
        out(json.dumps({"model": model, "precisions": rows, "about": about}, indent=1))
    else:
        out(_table(rows))
        out("\n".join(f"{name}: {value}" for name, value in about.items()))
    if all("error" in row for row in rows.values()):
        raise SystemExit(FAILED)


def _fetch(model: str, source: Source | None) -> None:
    """Have the model's files here before anything is measured, or end with the reason.

    Raises: SettingsError, HubError.
    """
    from emb_model_provider.cli.options import open_manager
    from emb_model_provider.cli.progress import CommandProgress
    from emb_model_provider.model_resolver import resolve_model

    settings, manager = open_manager()
    spec = resolve_model(settings, model, source=source)
    with CommandProgress("auto") as report:
        run_until_interrupted(lambda: manager.ensure(spec, on_progress=report), GO_ON)


def _throughput(measured: dict[str, FidelityWorker], rounds: int, rows: dict[str, dict[str, Any]]) -> None:
    """Measure the processes in turn, since machines drift, and put medians and ratios to the first into `rows`.

    A process that dies on the way has its error for a row.
    """
    rates: dict[str, dict[str, list[float]]] = {one: {kind: [] for kind in _KINDS} for one in measured}
    for number in range(rounds if measured else 0):
        say(f"throughput: round {number + 1} of {rounds}")
        for kind in _KINDS:
            for precision in tuple(rates):
                answer = measured[precision].rate(kind)
                if "error" in answer:
                    rows[precision] = answer
                    del rates[precision]
                else:
                    rates[precision][kind].append(answer["texts_per_s"])
    for precision, by_kind in rates.items():
        for kind, found in by_kind.items():
            base = next(iter(rates.values()))[kind]
            rows[precision][f"{kind}_texts_per_s"] = statistics.median(found)
            rows[precision][f"{kind}_ratio"] = statistics.median(
                a / b for a, b in zip(found, base, strict=True)
            )


def _notes(row: dict[str, Any]) -> list[str]:
    """Return what to know of a row beside its figures."""
    notes = list(row.get("notes", ()))
    if row.get("fidelity") and row["fidelity"]["min_cosine"] < row["floor"]:
        notes.append(f"not served: below its floor of {row['floor']:g} (EMB_PROVIDER_FIDELITY_FLOORS)")
    return notes


def _table(rows: dict[str, dict[str, Any]]) -> str:
    base = next((precision for precision, row in rows.items() if "error" not in row), "first")
    head = (
        "precision", "computed in", "min cosine", "mean cosine", "top-10", "Spearman", "disk, MB", "resident, MB",
        "peak, MB", "load, s", "short texts/s", f"÷ {base}", "documents/s", f"÷ {base}",
    )  # fmt: skip
    lines = [head, *(_cells(precision, row) for precision, row in rows.items())]
    widths = [max(len(line[place]) for line in lines if len(line) == len(head)) for place in range(len(head))]
    shown = [_line(line, widths) for line in lines]
    shown.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(shown)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    if len(cells) < len(widths):
        return f"| {cells[0]} | {cells[1]} |" + " |" * (len(widths) - 2)
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"


def _cells(precision: str, row: dict[str, Any]) -> tuple[str, ...]:
    if "error" in row:
        return precision, f"not possible: {row['error']}"
    figures = ("min_cosine", "mean_cosine", "top10_overlap", "spearman")
    # fp32 in torch is what others are compared with. All else without figures was not measured; a note says why.
    unmeasured = 1.0 if row["precision"] == "fp32" else None
    found = row["fidelity"] or dict.fromkeys(figures, unmeasured)
    return (
        precision,
        f"{row['computed']} ({row['backend']})",
        *(_share(found[name]) for name in figures),
        *(_megabytes(row[name]) for name in ("disk_bytes", "resident_bytes", "peak_bytes")),
        f"{row['load_s']:.2f}",
        f"{row['short_texts_per_s']:,.0f}",
        f"{row['short_ratio']:.2f}",
        f"{row['doc_texts_per_s']:,.1f}",
        f"{row['doc_ratio']:.2f}",
    )


def _share(value: float | None) -> str:
    return "-" if value is None else format_cosine(value)


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.1f}"


def _about() -> dict[str, str]:
    from emb_model_provider.backends.hardware import usable_cpus

    versions = []
    for package in ("emb-model-provider", *_PACKAGES):
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return {
        "machine": f"{_processor()}, {usable_cpus()} cores, {platform.system()} {platform.machine()}",
        "versions": f"Python {platform.python_version()}, {', '.join(versions)}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


COMMAND = (sys.executable, "-m", "emb_model_provider.cli.fidelity_worker")


class FidelityWorker:
    """A model in a process of its own, told over a pipe what to measure."""

    def __init__(self, process: subprocess.Popen[str], job: dict[str, Any]) -> None:
        self._process = process
        self.loaded = self._ask(json.dumps(job))
        """What was loaded, or `error`: why it could not be."""

    def rate(self, kind: str) -> dict[str, Any]:
        """Return `texts_per_s`, or `error`."""
        return self._ask(kind)

    def _ask(self, line: str) -> dict[str, Any]:
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("started without pipes")
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        answered = self._process.stdout.readline()
        if not answered:
            return {"error": _last_words(self._process.wait())}
        answer: dict[str, Any] = json.loads(answered)
        return answer


def _last_words(status: int) -> str:
    if status == -signal.SIGKILL:
        return "the measuring process was killed, most often since memory was short: measure fewer precisions at a time"
    return f"the measuring process ended with status {status}: what it said stands on stderr"


@contextlib.contextmanager
def start_fidelity_worker(job: dict[str, Any]) -> Iterator[FidelityWorker]:
    """Yield a process that measures what `job` says; it ends with the context, at once where that fails."""
    with contextlib.ExitStack() as stack:
        with _interrupts_wait():
            process = stack.enter_context(
                subprocess.Popen(  # noqa: S603 - our own module, run by our own interpreter
                    COMMAND,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    encoding="utf-8",
                )
            )
            stack.callback(_close, process.stdin)
            stack.push(lambda failed, _error, _trace: process.kill() if failed else None)
        yield FidelityWorker(process, job)


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Let Ctrl-C wait until what is started in here is sure to be ended with this process.

    What is started inherits it, and so is ended by this process alone, without a traceback of its own.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    came: list[int] = []
    # Blocked for what is started here. In this process another thread (numpy has some) may take the signal, whose
    # handler is called on this one all the same.
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
    if came:
        raise KeyboardInterrupt


def _close(pipe: IO[str] | None) -> None:
    # What was not sent to a process that died cannot be sent by closing its pipe either.
    with contextlib.suppress(BrokenPipeError):
        if pipe is not None:
            pipe.close()
