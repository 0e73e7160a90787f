"""`emb-provider fidelity MODEL`: measures what every precision costs and saves on this machine."""

from __future__ import annotations

import contextlib
import json
import platform
import signal
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Any

import click

from emb_model_provider.cli import options
from emb_model_provider.cli.interrupt import RESUME_HINT, delayed_interrupts, run_until_interrupted
from emb_model_provider.cli.output import out, print_json, say, show_progress
from emb_model_provider.error_table import FAILED
from emb_model_provider.formatting import format_cosine

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from emb_model_provider.model_spec import Source

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int4")
WORKER_COMMAND = (sys.executable, "-m", "emb_model_provider.cli.fidelity_worker")

_KINDS = ("short", "doc")
_PACKAGES = ("openvino", "nncf", "torch", "torchao", "bitsandbytes", "sentence-transformers")


class _Precisions(click.ParamType[tuple[str, ...]]):
    name = "LIST"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        if isinstance(value, tuple):
            return value
        precisions = tuple(part.strip().lower() for part in str(value).split(",") if part.strip())
        unknown = [precision for precision in precisions if precision not in PRECISIONS]
        if unknown:
            self.fail(f"{', '.join(unknown)}: choose from {', '.join(PRECISIONS)}", param, ctx)
        if not precisions:
            self.fail(f"the list is empty: choose from {', '.join(PRECISIONS)}", param, ctx)
        return precisions


@click.command()
@click.argument("model", type=options.ModelId(), metavar="MODEL")
@click.option("--precisions", type=_Precisions(), default=",".join(PRECISIONS), show_default=True,
              help="Precisions to measure. The throughput of the others is compared with the first.")  # fmt: skip
@options.source
@click.option("--backend", type=click.Choice(["auto", "openvino", "torch"]), help="Default: as configured.")
@click.option("--device", help="auto, cpu, cuda, cuda:N or mps. Default: as configured.")
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True,
              help="Rounds of throughput measurements. The result is their median.")  # fmt: skip
@options.json
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
    """Measure a model at several precisions.

    Shows how close its vectors are to those at fp32, and how much time and memory each precision takes. MODEL is an
    alias of the settings, a repository id or a directory. Compiled forms are kept, so that the service starts quickly
    at these precisions.

    JSON: {"model", "precisions": {precision: its figures, or {"error"}}, "about": {machine, versions, date}}.
    """
    _download(model, source)
    rows: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        workers: dict[str, FidelityWorker] = {}
        for precision in precisions:
            job = {"model": model, "source": source, "precision": precision, "backend": backend, "device": device}
            say(f"{precision}: preparing")
            # The first worker compiles and compares. The second one only loads, so that memory and time are the model's.
            with start_fidelity_worker(job) as first:
                rows[precision] = first.loaded
            if "error" in first.loaded:
                continue
            worker = stack.enter_context(start_fidelity_worker(job))
            rows[precision] = worker.loaded
            if "error" not in worker.loaded:
                workers[precision] = worker
        _measure_throughput(workers, rounds, rows)
    for precision, row in rows.items():
        for note in _notes(row):
            say(f"{precision}: {note}")
    about = _about()
    if as_json:
        print_json({"model": model, "precisions": rows, "about": about})
    else:
        out(_format_table(rows))
        out("\n".join(f"{name}: {value}" for name, value in about.items()))
    if all("error" in row for row in rows.values()):
        raise SystemExit(FAILED)


class FidelityWorker:
    """Client of a child process that has loaded a model at one precision."""

    def __init__(self, process: subprocess.Popen[str], job: Mapping[str, Any]) -> None:
        self._process = process
        self.loaded = self.request(json.dumps(job))
        """Figures of the loaded model, or `error`."""

    def request(self, line: str) -> dict[str, Any]:
        """Send a line, and return the answer: `texts_per_s` to a kind of texts, or `error`."""
        if self._process.stdin is None or self._process.stdout is None:
            raise RuntimeError("the process was started without pipes")
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        response = self._process.stdout.readline()
        if not response:
            return {"error": _describe_exit(self._process.wait())}
        values: dict[str, Any] = json.loads(response)
        return values


@contextlib.contextmanager
def start_fidelity_worker(job: Mapping[str, Any], command: Sequence[str] = WORKER_COMMAND) -> Iterator[FidelityWorker]:
    """Start a child process that loads a model, and end it with the context. The job has the arguments of its `load`."""
    with contextlib.ExitStack() as stack:
        with delayed_interrupts():
            process = stack.enter_context(
                subprocess.Popen(  # noqa: S603 - our own module, run by our own interpreter
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
                )
            )
            stack.callback(_close, process.stdin)
            stack.push(lambda failed, _error, _trace: process.kill() if failed else None)
        yield FidelityWorker(process, job)


def _close(pipe: IO[str] | None) -> None:
    with contextlib.suppress(BrokenPipeError):  # the process has died before it has read everything
        if pipe is not None:
            pipe.close()


def _describe_exit(status: int) -> str:
    if status == -signal.SIGKILL:
        return "the measuring process was killed, most likely for lack of memory: measure fewer precisions at a time"
    return f"the measuring process ended with status {status}: see its output above"


# --- measuring ----------------------------------------------------------------------------------------


def _download(model: str, source: Source | None) -> None:
    from emb_model_provider.model_resolver import resolve_model

    settings, manager = options.open_manager()
    spec = resolve_model(settings, model, source=source)
    with show_progress("auto") as report:
        run_until_interrupted(lambda: manager.ensure(spec, on_progress=report), RESUME_HINT)


def _measure_throughput(workers: Mapping[str, FidelityWorker], rounds: int, rows: dict[str, dict[str, Any]]) -> None:
    """Add medians of the throughput, and of its ratio to the first precision, to the rows.

    The workers take turns, because the speed of a machine drifts. The row of a worker that dies becomes its error.
    """
    rates: dict[str, dict[str, list[float]]] = {name: {kind: [] for kind in _KINDS} for name in workers}
    for number in range(rounds if workers else 0):
        say(f"throughput: round {number + 1} of {rounds}")
        for kind in _KINDS:
            for precision in tuple(rates):
                response = workers[precision].request(kind)
                if "error" in response:
                    rows[precision] = response
                    del rates[precision]
                else:
                    rates[precision][kind].append(response["texts_per_s"])
    for precision, by_kind in rates.items():
        for kind, values in by_kind.items():
            base = next(iter(rates.values()))[kind]
            rows[precision][f"{kind}_texts_per_s"] = statistics.median(values)
            rows[precision][f"{kind}_ratio"] = statistics.median(
                value / reference for value, reference in zip(values, base, strict=True)
            )


def _notes(row: Mapping[str, Any]) -> list[str]:
    notes = list(row.get("notes", ()))
    for output, value in row.get("agreement", {}).items():
        floor, setting = ("floor", "FIDELITY") if output == "dense" else ("agreement_floor", "AGREEMENT")
        if value < row[floor]:
            notes.append(f"not served: below its floor of {row[floor]:g} (EMB_PROVIDER_{setting}_FLOORS)")
    return notes


def _about() -> dict[str, str]:
    from emb_model_provider.artifacts.recipe import installed_version
    from emb_model_provider.backends.hardware import usable_cpus
    from emb_model_provider.doctor.machine import processor_name

    versions = {package: installed_version(package) for package in ("emb-model-provider", *_PACKAGES)}
    installed = ", ".join(f"{package} {found}" for package, found in versions.items() if found is not None)
    return {
        "machine": f"{processor_name() or 'unknown processor'}, {usable_cpus()} cores, "
        f"{platform.system()} {platform.machine()}",
        "versions": f"Python {platform.python_version()}, {installed}",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


# --- the table ----------------------------------------------------------------------------------------


def _format_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    base = next((precision for precision, row in rows.items() if "error" not in row), "first")
    others = list(dict.fromkeys(name for row in rows.values() for name in row.get("agreement", {}) if name != "dense"))
    head = (
        "precision", "computed in", "min cosine", "mean cosine", "top-10", "Spearman",
        *(f"agreement of {name}" for name in others), "disk, MB", "resident, MB",
        "peak, MB", "load, s", "short texts/s", f"÷ {base}", "documents/s", f"÷ {base}",
    )  # fmt: skip
    lines = [head, *(_cells(precision, row, others) for precision, row in rows.items())]
    widths = [max(len(line[column]) for line in lines if len(line) == len(head)) for column in range(len(head))]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(_format_line(line, widths) for line in lines)


def _format_line(cells: Sequence[str], widths: Sequence[int]) -> str:
    if len(cells) < len(widths):  # an error
        return f"| {cells[0]} | {cells[1]} |" + " |" * (len(widths) - 2)
    return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"


def _cells(precision: str, row: Mapping[str, Any], others: Sequence[str] = ()) -> tuple[str, ...]:
    """Return the cells of a row, with the agreement of other outputs than dense vectors."""
    if "error" in row:
        return precision, f"not possible: {row['error']}"
    names = ("min_cosine", "mean_cosine", "top10_overlap", "spearman")
    # fp32 in torch is the reference. For other rows without figures, which were not measured, a note says why.
    default = 1.0 if row["precision"] == "fp32" else None
    figures = row["fidelity"] or dict.fromkeys(names, default)
    return (
        precision,
        f"{row['computed']} ({row['backend']})",
        *(_format_figure(figures[name]) for name in names),
        *(_format_figure(row["agreement"].get(name, default)) for name in others),
        *(_format_megabytes(row[name]) for name in ("disk_bytes", "resident_bytes", "peak_bytes")),
        f"{row['load_s']:.2f}",
        f"{row['short_texts_per_s']:,.0f}",
        f"{row['short_ratio']:.2f}",
        f"{row['doc_texts_per_s']:,.1f}",
        f"{row['doc_ratio']:.2f}",
    )


def _format_figure(value: float | None) -> str:
    return "-" if value is None else format_cosine(value)


def _format_megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.1f}"
