"""`emb-provider` as a user runs it: in a process of its own, or, where a process does not matter, in this one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from click.testing import CliRunner

from emb_model_provider.cli.main import main
from tests.service import environment

if TYPE_CHECKING:
    from click.testing import Result

SCRIPT = Path(sys.executable).with_name("emb-provider")


def run(
    directory: Path, *arguments: str, stdin: str | None = None, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in `directory`, with its cache there, and with these settings alone."""
    given: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    return subprocess.run(
        [str(SCRIPT), *arguments],
        cwd=directory,
        env=environment(directory, **settings),
        capture_output=True,
        encoding="utf-8",
        check=False,
        **given,
    )


def invoke(*arguments: str, stdin: str | None = None) -> Result:
    """Run a command in this process, under its environment; stdin is no terminal."""
    result = CliRunner().invoke(main, arguments, input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def asked(*arguments: str, status: int = 0) -> Any:
    """Run a command with --json in this process and return what it printed."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)
