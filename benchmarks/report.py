"""Progress lines, the description of the machine, and Markdown tables."""

from __future__ import annotations

import math
import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import psutil

from benchmarks import ROOT

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

NONE = "–"
"""A cell without a value."""
_CPU_FLAGS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "amx_fp16",
)  # fmt: skip
_PACKAGES = (
    "openvino", "torch", "sentence-transformers", "transformers", "tokenizers", "numpy", "fastapi", "uvicorn",
)  # fmt: skip
_PATH_OPTIONS = ("--json", "--directory")


def log_progress(line: str) -> None:
    """Print a line with the time of day to stderr, because stdout is for the tables."""
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def describe_run(module: str, notes: Iterable[str]) -> str:
    """Return a Markdown list: machine, versions, commit, command, date, and `notes`."""
    command = shlex.join(["uv", "run", "python", "-m", module, *_without_paths(sys.argv[1:])])
    lines = [
        f"Machine: {_machine()}",
        f"Versions: Python {platform.python_version()}, {', '.join(filter(None, map(_version, _PACKAGES)))}, "
        f"Linux {platform.release().split('-')[0]}",
        f"Code: {_version('emb-model-provider')}{_commit()}",
        f"Command: `{command}`",
        f"Date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        *notes,
    ]
    return "\n".join(f"- {line}" for line in lines)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table. All columns except the first are aligned right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def format_number(value: float) -> str:
    """Return a number with three significant digits, or as an integer from 100 on."""
    if not math.isfinite(value):
        return NONE
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def format_spread(values: Sequence[float]) -> str:
    """Return the median of several rounds, and their range if there is more than one."""
    if not values:
        return NONE
    middle = format_number(median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({format_number(min(values))}–{format_number(max(values))})"


def format_counts(counts: Mapping[str, int]) -> str:
    """Return counts such as `3 503, 1 timeout`, the largest first; `0` if there are none."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{count} {name}" for name, count in ordered) or "0"


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return the ratio of each round, so that a drift between rounds cancels out."""
    return [a / b for a, b in zip(numerators, denominators, strict=True) if b]


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    supported = fields.get("flags", "").split()
    flags = " ".join(flag for flag in _CPU_FLAGS if flag in supported) or "no AVX2"
    name, cores = fields.get("model name", platform.machine()), len(os.sched_getaffinity(0))
    return f"{name}, {cores} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB; {flags}"


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return result.stdout.strip()

    try:
        changes = " with changes" if git("status", "--porcelain") else ""
        return f", commit {git('rev-parse', '--short=12', 'HEAD')}{changes}"
    except (OSError, subprocess.CalledProcessError):
        return ""


def _without_paths(arguments: Sequence[str]) -> list[str]:
    """Remove options whose values are paths of this machine."""
    kept: list[str] = []
    is_value = False
    for argument in arguments:
        if is_value:
            is_value = False
        elif argument in _PATH_OPTIONS:
            is_value = True
        elif argument.partition("=")[0] not in _PATH_OPTIONS:
            kept.append(argument)
    return kept
