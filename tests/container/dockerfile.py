"""Reads the Dockerfile, and runs its instructions as shell scripts in a scratch directory."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
_CREATED = re.compile(r"(?<![\w./])/(?=(?:opt/venv|data|app|src)\b)")
"""The first slash of a path that the Dockerfile creates."""


class Instruction(NamedTuple):
    name: str
    text: str


def stages() -> list[list[Instruction]]:
    """Return the instructions of each stage, without FROM."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    stages: list[list[Instruction]] = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        instruction = Instruction(*line.split(maxsplit=1))
        if instruction.name == "FROM":
            stages.append([])
        else:
            stages[-1].append(instruction)
    return stages


def final(name: str) -> str:
    """Return the text of the only instruction with this name in the final stage."""
    (text,) = (step.text for step in stages()[-1] if step.name == name)
    return text


def exec_form(name: str) -> list[str]:
    """Return the command of the CMD or HEALTHCHECK."""
    text = final(name)
    words: list[str] = json.loads(text[text.index("[") :])
    return words


def variables() -> dict[str, str]:
    """Return the environment variables of the image, as written."""
    return dict(word.split("=", 1) for word in shlex.split(final("ENV")))


class Image:
    """The file system that the instructions create, with a directory instead of `/`."""

    def __init__(self, root: Path, torch: str) -> None:
        """Build the image in `root`, with the build argument TORCH."""
        self.root = root
        self.user = int(final("USER").partition(":")[0]) if os.geteuid() == 0 else None
        """User of the container; None if the user of this process cannot be changed."""
        self._torch = torch
        self._environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
        base = self._make_base()
        for stage in stages():
            result = subprocess.run(
                ["/bin/sh", "-c", "\n".join(["set -e", *map(self._to_shell, stage)])],
                cwd=root,
                env=os.environ | self._environment | {"PATH": f"{base}/bin:/usr/bin:/bin"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            assert result.returncode == 0, result.stdout[-4000:]

    def path(self, path: str) -> Path:
        """Return the place of a path of the image."""
        return self.root / path.removeprefix("/")

    def start(
        self, command: list[str], *, user: int | None = None, group: int | None = None, **settings: str
    ) -> subprocess.Popen[bytes]:
        """Start a command with the working directory and environment of the container, by default as its user."""
        steps = [self._to_shell(step) for step in stages()[-1] if step.name in {"ENV", "WORKDIR"}]
        exports = [f"export EMB_PROVIDER_{name}={shlex.quote(value)}" for name, value in settings.items()]
        script = "\n".join(["set -e", *steps, *exports, 'exec "$@"'])
        return subprocess.Popen(
            ["/bin/sh", "-c", script, "sh", *command],
            env=self._environment,
            user=self.user if user is None else user,
            group=self.user if group is None else group,
            extra_groups=None if self.user is None else [],
            stdin=subprocess.DEVNULL,
        )

    def _make_base(self) -> Path:
        """Make a virtual environment with pip that stands for the base image."""
        python = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
        command = ["/bin/sh", "-c", f"exec {shlex.quote(str(python))} -c ''"]
        if subprocess.run(command, user=self.user, capture_output=True, check=False).returncode != 0:
            # Python is in a directory that the user of the container cannot enter.
            prefix = self.root / "usr" / "local"
            ignored = shutil.ignore_patterns("site-packages", "test", "include", "share")
            shutil.copytree(sys.base_prefix, prefix, symlinks=True, ignore=ignored)
            python = prefix / "bin" / python.name
            self._environment["LD_LIBRARY_PATH"] = str(prefix / "lib")
        base = self.root / "base"
        subprocess.run([python, "-m", "venv", base], env=os.environ | self._environment, check=True)
        return base

    def _to_shell(self, step: Instruction) -> str:
        text = _CREATED.sub(f"{self.root}/", step.text)
        match step.name:
            case "ARG" if "=" in text:
                return f"export {text} TORCH={self._torch}"
            case "ENV":
                # Packages come from uv's cache and are not compiled, which saves minutes.
                return f"export {text}\nunset UV_NO_CACHE UV_COMPILE_BYTECODE"
            case "WORKDIR":
                return f"mkdir -p {text}; cd {text}"
            case "COPY" if text.startswith("--from="):
                return f"test -e {text.split()[-1]}"  # all stages share one directory
            case "COPY":
                *sources, target = text.split()
                return f"cp -R {' '.join(str(ROOT / source) for source in sources)} {target}"
            case "RUN":
                return text if self.user is not None else re.sub(r" -[og] \d+", "", text)
        return ""
