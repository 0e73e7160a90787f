"""Programs in environments of their own, because their packages are many, or conflict with those of the project.

`isolated/NAME.in` has the packages of an environment, `isolated/NAME.txt` the pinned versions of all that they need
(`.ci/pin`), and the scripts beside them run in these environments. uv keeps the packages in its cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.service import NO_NETWORK

if TYPE_CHECKING:
    from collections.abc import Mapping

SCRIPTS = Path(__file__).with_name("isolated")
_UV = os.environ.get("UV", "uv")
"""Set by `uv run`, which may not be on PATH."""


class Environment:
    """An installed environment, and how to run programs in it."""

    def __init__(
        self,
        name: str,
        directory: Path,
        variables: Mapping[str, str],
        scripts: Path = SCRIPTS,
        *,
        has_project: bool = False,
    ) -> None:
        """Install the packages of `NAME.txt` in `scripts`. Programs get these variables, and no network.

        With `has_project` they also find the project with its packages, behind their own ones.
        """
        inherited = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")}
        self.directory = directory
        self._scripts = scripts
        self.variables = inherited | NO_NETWORK | {"NO_PROXY": "localhost,127.0.0.1", **variables}
        requirements = scripts / f"{name}.txt"
        # Not in the directory of the project, whose pins in pyproject.toml would apply.
        for command in (
            ["venv", "--quiet", "--python", sys.executable, directory / "venv"],
            ["pip", "install", "--quiet", "--python", directory / "venv", "--requirements", requirements],
        ):
            subprocess.run([_UV, *command], cwd=directory, check=True)
        if has_project:
            (packages,) = directory.glob("venv/lib/python*/site-packages")
            line = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
            (packages / "project.pth").write_text(line, encoding="utf-8")

    def program(self, name: str) -> str:
        """Return the path of a program of the environment, such as `python`."""
        return str(self.directory / "venv" / "bin" / name)

    def run(self, script: str, **arguments: Any) -> dict[str, Any]:
        """Run `SCRIPT.py` of `scripts`, and return the object that it prints. It reads the arguments as JSON."""
        run = subprocess.run(
            [self.program("python"), self._scripts / f"{script}.py"],
            input=json.dumps(arguments),
            cwd=self.directory,
            env=self.variables,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr[-4000:]
        result: dict[str, Any] = json.loads(run.stdout.splitlines()[-1])
        return result
