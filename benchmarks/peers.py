"""infinity, in an environment of its own: it needs versions of transformers and numpy that we do not."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from benchmarks.cache import CACHE

if TYPE_CHECKING:
    from pathlib import Path

INFINITY = "infinity-emb[torch,server,optimum]==0.0.78"
_SHOWN = ("infinity-emb", "torch", "transformers", "sentence-transformers")
_VERSIONS = """
from importlib.metadata import version
import sys
print(", ".join(f"{name} {version(name)}" for name in sys.argv[1:]))
"""


def infinity_environment(given: Path | None) -> Path:
    """Return a virtual environment that holds infinity: the one given, or one of ours, made when first needed."""
    directory = given.absolute() if given is not None else CACHE / "infinity-0.0.78"
    if (directory / "bin" / "infinity_emb").exists():
        return directory
    if given is not None:
        raise SystemExit(f"error: --infinity {given}: there is no bin/infinity_emb in it.")
    print(f"installing {INFINITY} into an environment of its own", file=sys.stderr)
    directory.parent.mkdir(parents=True, exist_ok=True)
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    subprocess.run(["uv", "venv", "--quiet", "--clear", "--python", python, str(directory)], check=True)
    subprocess.run(
        ["uv", "pip", "install", "--quiet", "--python", str(directory / "bin" / "python"), INFINITY],
        check=True,
        cwd=directory,  # outside the checkout, whose pyproject.toml constrains what is resolved inside it
    )
    return directory


def infinity_versions(directory: Path) -> str:
    python = str(directory / "bin" / "python")
    done = subprocess.run(
        [python, "-c", _VERSIONS, *_SHOWN], capture_output=True, text=True, check=True, cwd=directory
    )
    return done.stdout.strip()
