"""What a table must say of where it was measured."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.cache import ROOT

_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "amx_fp16")
_PACKAGES = (
    "openvino", "torch", "sentence-transformers", "transformers", "tokenizers", "numpy", "fastapi", "uvicorn",
)  # fmt: skip


def machine_lines(module: str, notes: list[str]) -> list[str]:
    """Return Markdown list items: machine, versions, command, date, and `notes`."""
    command = shlex.join(["uv", "run", "python", "-m", module, *_without_paths(sys.argv[1:])])
    return [
        f"- Machine: {_cpu()}",
        f"- Versions: Python {platform.python_version()}, {', '.join(filter(None, map(_version, _PACKAGES)))}, "
        f"Linux {platform.release().split('-')[0]}",
        f"- Code: {_commit()}",
        f"- Command: `{command}`",
        f"- Date: {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        *(f"- {note}" for note in notes),
    ]


def _cpu() -> str:
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info)}
    has = set(fields.get("flags", "").split())
    memory_kib = int(Path("/proc/meminfo").read_text(encoding="utf-8").split()[1])
    flags = " ".join(flag for flag in _FLAGS if flag in has) or "no AVX2"
    cores = len(os.sched_getaffinity(0))
    return f"{fields.get('model name', platform.machine())}, {cores} cores, {memory_kib / 2**20:.0f} GiB; {flags}"


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = " with changes" if git("status", "--porcelain") else ""
        return f"emb-model-provider {version('emb-model-provider')}, commit {git('rev-parse', '--short=12', 'HEAD')}{changed}"
    except (OSError, subprocess.CalledProcessError):
        return f"emb-model-provider {version('emb-model-provider')}"


def _without_paths(arguments: list[str]) -> list[str]:
    """Leave out where things lie on this machine."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in {"--infinity", "--json"}:
            skip = True
        elif not argument.startswith(("--infinity=", "--json=")):
            kept.append(argument)
    return kept
