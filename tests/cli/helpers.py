"""Runs `emb-provider` as a user does: in a separate process, or in this one if that makes no difference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from click.testing import CliRunner

from emb_model_provider.cli.main import main
from tests.service import environment

if TYPE_CHECKING:
    from click.testing import Result

SCRIPT = Path(sys.executable).with_name("emb-provider")


def run(
    directory: Path, *arguments: str, stdin: str | None = None, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in `directory`, which contains its cache, with only these settings."""
    source: dict[str, Any] = {"stdin": subprocess.DEVNULL} if stdin is None else {"input": stdin}
    return subprocess.run(
        [str(SCRIPT), *arguments],
        cwd=directory,
        env=environment(directory, **settings),
        capture_output=True,
        encoding="utf-8",
        check=False,
        **source,
    )


def start(directory: Path, *arguments: str, new_session: bool = False, **settings: str) -> subprocess.Popen[str]:
    """Start a command in `directory`; its output is piped."""
    return subprocess.Popen(
        [str(SCRIPT), *arguments],
        cwd=directory,
        env=environment(directory, **settings),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=new_session,
    )


def run_python(directory: Path, program: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program in `directory`."""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=directory,
        env=environment(directory, **settings),
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


def invoke(*arguments: str, stdin: str | None = None) -> Result:
    """Run a command in this process and its environment; stdin is not a terminal."""
    result = CliRunner().invoke(main, arguments, input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def invoke_json(*arguments: str, status: int = 0) -> Any:
    """Run a command with --json in this process and return what it printed."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == status, result.output
    return json.loads(result.stdout)


def pull_files(*arguments: str) -> Path:
    """Pull a model without compiling it, and return the directory of its files."""
    result = invoke("pull", *arguments, "--no-compile", "-q")
    assert result.exit_code == 0, result.output
    return Path(result.stdout.strip())


def cache_content(directory: Path) -> set[str]:
    """Return all files and empty directories in the caches of `directory`, except lock files, which are never removed."""
    paths = [path for name in ("cache", "hf", "ms") for path in (directory / name).rglob("*")]
    return {
        path.as_posix()
        for path in paths
        if (not any(path.iterdir()) if path.is_dir() else path.suffix not in (".lock", ".hold"))
    }


def phases(stderr: str) -> list[str]:
    """Return the phases that `--progress json` printed, in their order."""
    lines = [json.loads(line) for line in stderr.splitlines() if line.startswith("{")]
    return list(dict.fromkeys(line["phase"] for line in lines if "phase" in line))


def run_doctor(*, status: int = 0) -> dict[str, dict[str, Any]]:
    """Return the results of the doctor by the name of the check, the worst of each name."""
    report = invoke_json("doctor", status=status)
    assert report["ok"] is (status == 0)
    order = {"ok": 0, "warn": 1, "fail": 2}
    return {result["check"]: result for result in sorted(report["checks"], key=lambda result: order[result["level"]])}


def processes_in(directory: Path) -> list[int]:
    """Return the ids of the processes whose working directory is `directory`."""
    processes = psutil.process_iter(["pid", "cwd"])
    return [process.info["pid"] for process in processes if process.info["cwd"] == str(directory)]
