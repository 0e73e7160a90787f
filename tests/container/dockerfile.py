"""The Dockerfile as plain steps, and a directory that stands for the image's file system."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
_OURS = re.compile(r"(?<![\w./])/(?=(?:opt/venv|data|app|src)\b)")
"""The beginning of a path that the Dockerfile makes, and not the base image."""
_OUTSIDE = re.compile(r"(PIP_|UV_|SSL_|.*_CA_BUNDLE$|.*_proxy$)", re.IGNORECASE)
"""Variables that say how this machine reaches its package index."""


@dataclass(frozen=True)
class Instruction:
    name: str
    text: str

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)

    @property
    def pairs(self) -> dict[str, str]:
        """The variables of an ENV."""
        return dict(word.split("=", 1) for word in self.words)


def instructions() -> list[Instruction]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines()]


def final_stage() -> list[Instruction]:
    steps = instructions()
    last = max(index for index, step in enumerate(steps) if step.name == "FROM")
    return steps[last:]


def the(name: str) -> Instruction:
    """Return the one instruction of this name in the final stage."""
    (found,) = (step for step in final_stage() if step.name == name)
    return found


def command(instruction: Instruction) -> list[str]:
    """Return the exec form of a CMD or a HEALTHCHECK."""
    words: list[str] = json.loads(instruction.text[instruction.text.index("[") :])
    return words


@dataclass
class Image:
    """What the Dockerfile's steps make, under a directory in place of `/`."""

    root: Path
    torch: str
    """The build argument TORCH."""
    log: list[str] = field(default_factory=list)

    def path(self, text: str) -> str:
        return _OURS.sub(lambda _: f"{self.root}/", text)

    @property
    def user(self) -> int | None:
        """The user to run as: the Dockerfile's, where this process may choose; else None, which is oneself."""
        return int(the("USER").text.split(":")[0]) if os.geteuid() == 0 else None

    def build(self) -> None:
        base = self._base_python()
        working_directory = self.root
        build_environment: dict[str, str] = {}
        for step in instructions():
            if step.name == "FROM":
                build_environment = self._outside() | base
            elif step.name == "ARG" and "=" in step.text:
                build_environment |= step.pairs | {"TORCH": self.torch}
            elif step.name == "ENV":
                # Here the packages come out of uv's cache, and take no time to compile.
                wanted = {
                    n: v for n, v in step.pairs.items() if n not in {"UV_NO_CACHE", "UV_COMPILE_BYTECODE"}
                }
                build_environment |= self._expanded(wanted, build_environment)
            elif step.name == "WORKDIR":
                working_directory = Path(self.path(step.text))
                working_directory.mkdir(parents=True, exist_ok=True)
            elif step.name == "COPY":
                self._copy(step, working_directory)
            elif step.name == "RUN":
                self._run(step, working_directory, build_environment)

    def environment(self, **settings: str) -> dict[str, str]:
        """Return what the container's process gets: the final stage's ENV, and the settings of its start."""
        made = self._base_environment
        for step in final_stage():
            if step.name == "ENV":
                made = made | self._expanded(step.pairs, made)
        return made | {f"EMB_PROVIDER_{name}": value for name, value in settings.items()}

    def start(self, words: list[str], **settings: str) -> subprocess.Popen[bytes]:
        """Start a command as the container would: its user, working directory and variables."""
        environment = self.environment(**settings)
        executable = shutil.which(words[0], path=environment["PATH"])
        assert executable is not None, words
        return subprocess.Popen(
            [executable, *words[1:]],
            cwd=self.path(the("WORKDIR").text),
            env=environment,
            user=self.user,
            group=self.user,
            extra_groups=[] if self.user is not None else None,
            stdin=subprocess.DEVNULL,
        )

    def files(self) -> set[str]:
        """Return every file outside the volume."""
        volume = self.path(the("VOLUME").text)
        found = set()
        for parent, directories, names in os.walk(self.root):
            directories[:] = [name for name in directories if f"{parent}/{name}" != volume]
            found |= {f"{parent}/{name}" for name in names}
        return found

    def packages(self) -> Path:
        """Return the directory that holds the installed packages."""
        (directory,) = Path(self.path("/opt/venv/lib")).glob("python3.*/site-packages")
        return directory

    def set_writable(self, *, writable: bool) -> None:
        """Forbid the present user to write to the code, where that is not another user than the service's."""
        if self.user is not None:
            return
        for parent, _, _ in os.walk(self.path("/opt/venv")):
            # Directories only: the files may be the very ones of uv's cache.
            Path(parent).chmod(0o755 if writable else 0o555)

    # --- steps ----------------------------------------------------------------------------------------

    def _base_python(self) -> dict[str, str]:
        """Make what stands for the base image: a Python with pip that the container's user can run."""
        python = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
        self._base_environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
        reachable = ["/bin/sh", "-c", f"exec {shlex.quote(str(python))} -c ''"]
        if subprocess.run(reachable, user=self.user, capture_output=True, check=False).returncode != 0:
            home = self.root / "usr" / "local"
            unwanted = shutil.ignore_patterns("site-packages", "test", "include", "share")
            shutil.copytree(sys.base_prefix, home, copy_function=_link, symlinks=True, ignore=unwanted)
            python = home / "bin" / python.name
            self._base_environment["LD_LIBRARY_PATH"] = str(home / "lib")
        base = self.root / "base"
        environment = self._outside() | self._base_environment
        subprocess.run([python, "-m", "venv", base], env=environment, check=True)
        return self._base_environment | {"PATH": f"{base}/bin:/usr/bin:/bin"}

    def _outside(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if _OUTSIDE.match(name) or name == "HOME"}
        kept.pop("UV_PROJECT_ENVIRONMENT", None)
        return kept

    def _expanded(self, pairs: dict[str, str], environment: dict[str, str]) -> dict[str, str]:
        return {
            name: self.path(re.sub(r"\$(\w+)", lambda match: environment.get(match[1], ""), value))
            for name, value in pairs.items()
        }

    def _copy(self, step: Instruction, working_directory: Path) -> None:
        if step.words[0].startswith("--from="):
            # From the build stage, which lies in the same place.
            assert Path(self.path(step.words[-1])).exists(), step
            return
        *sources, target = step.words
        destination = working_directory / self.path(target)
        for source in sources:
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, destination, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / source, destination)

    def _run(self, step: Instruction, working_directory: Path, environment: dict[str, str]) -> None:
        text = self.path(step.text)
        if self.user is None:
            text = re.sub(r" -[og] \d+", "", text)  # only root gives directories away
        done = subprocess.run(
            ["/bin/sh", "-c", text],
            cwd=working_directory,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        self.log.append(f"{text}\n{done.stdout}")
        assert done.returncode == 0, self.log[-1][-4000:]


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
