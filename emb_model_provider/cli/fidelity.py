"""`emb-provider fidelity MODEL`: what every precision costs and saves, measured here."""

from __future__ import annotations

import contextlib
import json
import platform
import statistics
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
@click.argument("model")
@click.option("--precisions", type=_Precisions(), default=",".join(PRECISIONS), show_default=True,
              help="Precisions to measure; the others are compared with the first.")  # fmt: skip
@click.option("--source", type=click.Choice(["auto", "huggingface", "modelscope", "local", "bundled"]),
              help="Where MODEL is from.")  # fmt: skip
@click.option(
    "--backend", type=click.Choice(["auto", "openvino", "torch"]), default="auto", show_default=True
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True,
              help="Measurements of throughput, taken in turn; the table has their medians.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="JSON instead of a table.")
def fidelity(
    model: str,
    precisions: tuple[str, ...],
    source: str | None,
    backend: str,
    device: str,
    rounds: int,
    *,
    as_json: bool,
) -> None:
    """Measure MODEL at every precision: how near its vectors come to fp32, and what that saves.

    MODEL is an alias from your settings, the id of a repository, or a directory. What is compiled on the way is
    kept, so that serving it at that precision starts at once.
    """
    rows: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        measured: dict[str, _Process] = {}
        for precision in precisions:
            job = {
                "model": model,
                "source": source,
                "precision": precision,
                "backend": backend,
                "device": device,
            }
            click.echo(f"{precision}: preparing", err=True)
            # Once to compile and compare, which takes memory and time of its own; then afresh.
            with _process(job) as first:
                if "error" in first.loaded:
                    rows[precision] = first.loaded
                    continue
            measured[precision] = stack.enter_context(_process(job))
            rows[precision] = measured[precision].loaded
        rates: dict[str, dict[str, list[float]]] = {one: {kind: [] for kind in _KINDS} for one in measured}
        for number in range(rounds):
            click.echo(f"throughput: round {number + 1} of {rounds}", err=True)
            for kind in _KINDS:
                for precision, process in measured.items():
                    rates[precision][kind].append(process.rate(kind))
    for precision, by_kind in rates.items():
        for kind, found in by_kind.items():
            base = next(iter(rates.values()))[kind]
            rows[precision][f"{kind}_texts_per_s"] = statistics.median(found)
            rows[precision][f"{kind}_ratio"] = statistics.median(
                a / b for a, b in zip(found, base, strict=True)
            )
    about = _about()
    if as_json:
        click.echo(json.dumps({"model": model, "precisions": rows, "about": about}, indent=1))
    else:
        click.echo(_table(rows))
        click.echo("\n".join(f"{name}: {value}" for name, value in about.items()))
    if all("error" in row for row in rows.values()):
        raise SystemExit(1)


class _Process:
    """A model in a process of its own, told over a pipe what to measure."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.loaded = self._answer()

    def rate(self, kind: str) -> float:
        self._send(kind)
        return float(self._answer()["texts_per_s"])

    def _send(self, line: str) -> None:
        if self._process.stdin is None:
            raise RuntimeError("started without a pipe")
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def _answer(self) -> dict[str, Any]:
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line:
            raise click.ClickException(
                f"the measuring process ended with status {self._process.wait()}: what it said stands above. If it was "
                "killed, memory was short: measure fewer precisions at a time (--precisions)."
            )
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def _process(job: dict[str, Any]) -> Iterator[_Process]:
    with subprocess.Popen(
        [sys.executable, "-m", "emb_model_provider.cli.measuring"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
    ) as process:
        if process.stdin is None:
            raise RuntimeError("started without a pipe")
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        try:
            yield _Process(process)
        except BaseException:
            process.kill()
            raise


def _table(rows: dict[str, dict[str, Any]]) -> str:
    names = next(iter(rows))
    head = (
        "precision", "computed in", "min cosine", "mean cosine", "top-10", "Spearman", "disk, MB", "resident, MB",
        "peak, MB", "load, s", "short texts/s", f"÷ {names}", "documents/s", f"÷ {names}",
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
    found = row["fidelity"] or {"min_cosine": 1.0, "mean_cosine": 1.0, "top10_overlap": 1.0, "spearman": 1.0}
    return (
        precision,
        f"{row['computed']} ({row['backend']})",
        *(_share(found[name]) for name in ("min_cosine", "mean_cosine", "top10_overlap", "spearman")),
        *(_megabytes(row[name]) for name in ("disk_bytes", "resident_bytes", "peak_bytes")),
        f"{row['load_s']:.2f}",
        f"{row['short_texts_per_s']:,.0f}",
        f"{row['short_ratio']:.2f}",
        f"{row['doc_texts_per_s']:,.1f}",
        f"{row['doc_ratio']:.2f}",
    )


def _share(value: float | None) -> str:
    # Cut, not rounded: 0.999996 is not 1.
    return "-" if value is None else f"{int(value * 100_000) / 100_000:.5f}"


def _megabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e6:,.1f}"


def _about() -> dict[str, str]:
    from emb_model_provider.backends.cpu import usable_cpus

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
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - a plain read
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"
