"""Reads the Dockerfile, and runs its instructions as shell scripts in a scratch directory."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

ROOT = Path(__file__).parents[2]
_CREATED = re.compile(r"(?<![\w./])/(?=(?:opt/venv|opt/app|data|app|src|models)\b)")
"""The first slash of a path that the Dockerfile creates."""


class Instruction(NamedTuple):
    name: str
    text: str


class Stage(NamedTuple):
    name: str
    base: str
    """Another stage, or an image."""
    steps: list[Instruction]


def stages() -> dict[str, Stage]:
    """Return the stages by name. The last one, which is built by default, has none."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    found: dict[str, Stage] = {}
    current: list[Instruction] = []
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        instruction = Instruction(*line.split(maxsplit=1))
        if instruction.name == "FROM":
            base, _, name = instruction.text.partition(" AS ")
            current = []
            found[name] = Stage(name, base, current)
        elif found:
            current.append(instruction)
    return found


def steps(target: str = "") -> list[Instruction]:
    """Return the instructions of a target, those of the stages that it begins with included."""
    stage = stages()[target]
    return [*(steps(stage.base) if stage.base in stages() else []), *stage.steps]


def final(name: str, target: str = "") -> str:
    """Return the text of the instruction with this name that applies to a target."""
    return [step.text for step in steps(target) if step.name == name][-1]


def exec_form(name: str) -> list[str]:
    """Return the command of the CMD, ENTRYPOINT or HEALTHCHECK."""
    text = final(name)
    words: list[str] = json.loads(text[text.index("[") :])
    return words


def command() -> list[str]:
    """Return what the container runs."""
    return [*exec_form("ENTRYPOINT"), *exec_form("CMD")]


def variables(target: str = "") -> dict[str, str]:
    """Return the environment variables of the image, as written."""
    return dict(word.split("=", 1) for step in steps(target) if step.name == "ENV" for word in shlex.split(step.text))


class Image:
    """The file system that the instructions create, with a directory instead of `/`."""

    def __init__(
        self, root: Path, target: str = "", *, images: Mapping[str, Image] | None = None, **arguments: str
    ) -> None:
        """Build the image in `root`.

        Args:
            root: An empty directory.
            target: The stage to build.
            images: Images that stand for stages from which files are copied. All other stages share `root`.
            arguments: The build arguments.
        """
        self.root = root
        self.user = int(final("USER").partition(":")[0]) if os.geteuid() == 0 else None
        """User of the container; None if the user of this process cannot be changed."""
        self._target = target
        self._images = images or {}
        self._arguments = arguments
        self._environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
        self._base = self._make_base()
        self._built: list[str] = []
        self._build_missing()

    def extend(self, target: str) -> Image:
        """Return the image of a stage that begins with this one, in the same directory."""
        extended = copy.copy(self)
        extended._target, extended._built = target, list(self._built)
        extended._build_missing()
        return extended

    def path(self, path: str) -> Path:
        """Return the place of a path of the image."""
        return self.root / path.removeprefix("/")

    def start(
        self, command: list[str], *, user: int | None = None, group: int | None = None, **settings: str
    ) -> subprocess.Popen[bytes]:
        """Start a command with the working directory and environment of the container, by default as its user."""
        shown = {"ENV", "WORKDIR", "ARG"}
        script = [self._to_shell(step) for step in steps(self._target) if step.name in shown]
        script += [f"export EMB_PROVIDER_{name}={shlex.quote(value)}" for name, value in settings.items()]
        return subprocess.Popen(
            ["/bin/sh", "-c", "\n".join(["set -e", *script, 'exec "$@"']), "sh", *command],
            env=self._environment,
            user=self.user if user is None else user,
            group=self.user if group is None else group,
            extra_groups=None if self.user is None else [],
            stdin=subprocess.DEVNULL,
        )

    def _needed(self, target: str) -> list[str]:
        """Return the stages that a target consists of, in the order in which they are built."""
        found = stages()
        copied = [name for step in steps(target) for name in re.findall(r"^--from=(\S+)", step.text)]
        names = [name for each in copied if each not in self._images for name in self._needed(each)]
        stage = found[target]
        return list(dict.fromkeys([*(self._needed(stage.base) if stage.base in found else []), *names, target]))

    def _build_missing(self) -> None:
        for name in self._needed(self._target):
            if name not in self._built:
                self._build(stages()[name])
                self._built.append(name)

    def _build(self, stage: Stage) -> None:
        inherited = [self._to_shell(step) for step in steps(stage.name) if step.name in {"ENV", "ARG", "WORKDIR"}]
        own = [self._to_shell(step) for step in stage.steps]
        result = subprocess.run(
            ["/bin/sh", "-c", "\n".join(["set -e", *inherited, *own])],
            cwd=self.root,
            env=os.environ | self._environment | {"PATH": f"{self._base}/bin:/usr/bin:/bin"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout[-4000:]

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
            case "ARG":
                name, _, default = text.partition("=")
                return f"export {name}={shlex.quote(self._arguments.get(name, default))}"
            case "ENV":
                # Packages come from uv's cache and are not compiled, which saves minutes.
                return f"export {text}\nunset UV_NO_CACHE UV_COMPILE_BYTECODE"
            case "WORKDIR":
                return f"mkdir -p {text}; cd {text}"
            case "COPY" if text.startswith("--from="):
                stage, source, target = text.removeprefix("--from=").split()
                if stage in self._images:
                    return f"cp -R {self._images[stage].path(step.text.split()[-2])} {target}"
                return f"test -e {source}"  # all other stages share one directory
            case "COPY":
                *sources, target = text.split()
                return f"cp -R {' '.join(str(ROOT / source) for source in sources)} {target}"
            case "RUN":
                return text if self.user is not None else re.sub(r" -[og] \d+", "", text)
        return ""
